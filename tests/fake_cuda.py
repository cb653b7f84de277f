"""Runs of the trainer on a GPU that is not there: tensors have shapes, types and a device, but no values.

    python tests/fake_cuda.py LIBRARY FOLDER CASE...     # LIBRARY: fake_cuda.cpp, built; a JSON line for each case

What mixes devices or types, has no kernel, or asks for a value raises; what makes the host wait is counted.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

LIBRARIES = Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"
for name in ("libtorch_global_deps.so", "libc10.so", "libtorch.so"):
    ctypes.CDLL(str(LIBRARIES / name), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])

import torch  # noqa: E402
from runs import config_of, tiny_store  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from train import checkpoint, loop, state, warmup  # noqa: E402
from train import run as runs  # noqa: E402
from train.compile import Compiler  # noqa: E402
from train.data import Feed  # noqa: E402
from train.faults import WATCHED  # noqa: E402
from train.pending import Pending  # noqa: E402


class Event:
    """Of a stream: all that was asked for is done at once."""

    def record(self):
        return self

    record_event = query = synchronize = record


MODE = FakeTensorMode(allow_non_fake_inputs=True)
GPU = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: GPU,
    "get_device_capability": lambda device=None: (GPU.major, GPU.minor),
    "get_device_name": lambda device=None: GPU.name,
    "mem_get_info": lambda device=None: (GPU.total_memory, GPU.total_memory),
    "empty_cache": lambda: None,
    "is_current_stream_capturing": lambda: False,
    "current_stream": Event,
    "Event": Event,
    "get_rng_state": lambda: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state: None,
    "_lazy_init": lambda: None,
}
WAITS = []
"""What made the host wait for the device, since they were cleared."""


class Watch(TorchDispatchMode):
    """Notes copies between host and device that are waited for, and the names of all operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, function._schema.name
        self.seen.add(name)
        result = function(*arguments, **options)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = arguments[name == "aten::copy_"]
            waits = not (arguments[2] if len(arguments) > 2 else options.get("non_blocking", False))
            if waits and source.device.type != result.device.type:
                WAITS.append(f"{source.device.type} to {result.device.type} {list(result.shape)}")
        elif name == "aten::_fused_adamw_" and options["found_inf"] is None:
            WAITS.append("no flag for an update that is not finite")
        return result


def installed():
    """torch and the trainer, changed where they would call CUDA or look at values; each is a line that cannot run."""
    torch._C._cuda_setDevice = lambda index: None
    fake_tensor.init_gpu_context = lambda device: None
    for form in ("flash", "mem_efficient", "cudnn"):  # to choose between kernels torch asks the GPU
        getattr(torch.backends.cuda, f"enable_{form}_sdp")(False)
    torch.backends.cuda.enable_cudnn_sdp = lambda enabled: None
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    make = torch.tensor
    torch.tensor = lambda data, device=None, **kind: make(data, **kind).to(device or "cpu")
    torch.Tensor.pin_memory = lambda self: self
    torch.nn.Module.to = moved
    FakeTensor.tolist = lambda self: WAITS.append("values") or ones(self.shape)
    FakeTensor.__float__ = lambda self: WAITS.append("values") or 1.0
    write, read = checkpoint.write, checkpoint.load_file

    def written(folder, step, *, model, optimizer, **rest):
        write(folder, step, model=zeros(model), optimizer=zeros(optimizer), **rest)

    def loaded(path):
        with unset_fake_temporarily():
            found = read(path)
        return {name: MODE.from_tensor(tensor) for name, tensor in found.items()}

    checkpoint.write, checkpoint.load_file = written, loaded
    for module in (state, warmup):
        module.random_state, module.load_random_state = dict, lambda states: None


def moved(module, device):
    """`Module.to` swaps what fake tensors cannot swap."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = None if value is None else torch.nn.Parameter(value.detach().to(device))
    return module


def ones(shape):
    return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def zeros(tensors):
    """Real ones of their form, from the thread that writes."""
    assert {tensor.fake_device.type for tensor in tensors.values()} == {"cpu"}
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


CHANGES = {
    "document": {},
    "causal": {"model__mask": "causal"},
    "rope": {"model__positions": "rope"},
    "skyladder": {
        "model__mask": "causal",
        "curriculum__pacing": "skyladder",
        "curriculum__seqlen": 32,
        "curriculum__seqlen_start": None,
        "curriculum__seqlen_end": None,
        "curriculum__attention_window_start": 8,
    },
    "float32": {"run__dtype": "float32"},
    "recomputed": {"run__activation_checkpointing": True},
    "parts": {"batch__micro_batch_tokens": 8},
    "skip": {"run__on_nonfinite": "skip"},
    "adagc": {"optimizer__clipping": "adagc", "optimizer__clipping_warmup_steps": 1},
    "logits": {"run__attention_logits_every_steps": 1},
    "waits": {},
}


def steps(store, folder, case):
    """Three steps: what made the host wait, the operations, and whether batches were held in time."""
    held, handed = [], []
    hold, parts = Feed._hold, Feed.parts

    def holding(self, batch):
        held.append(batch.step)
        hold(self, batch)

    def handing(self, batch, most):
        for part in parts(self, batch, most):
            handed.append(batch.step in held)
            yield part

    Feed._hold, Feed.parts = holding, handing
    with MODE, Watch() as watch:
        this = runs.Run(config_of(store, folder, run__compile=False, run__device="cuda", **CHANGES[case]), print)
        warmup.warm_up(this)
        watch.seen.clear(), held.clear(), handed.clear(), WAITS.clear()
        for _ in range(3):
            this.step(next(this.loader))
            if case == "waits":
                this.nothing.cpu()
        waits = list(WAITS)
        this.fetch()
        this.loader.close()
    Feed._hold, Feed.parts = hold, parts
    operations = sorted(name for name in watch.seen if "attention" in name or "varlen" in name or "adamw" in name)
    return {"waits": waits, "fetch": WAITS[len(waits) :], "held": handed, "operations": operations}


def compiled(store, folder, case):
    """Every graph of a ramp, and those made after the warm-up."""
    make, runs.Compiler = runs.Compiler, lambda model: Compiler(model, "aot_eager")
    changes = {"model__layers": 1, "run__epochs": None, "run__total_tokens": 1500}
    if case == "compiled, recomputed":
        shorter = {"curriculum__duration_steps": 10, "run__total_tokens": 900}
        changes |= {**shorter, "run__activation_checkpointing": True}
    with MODE:
        this = runs.Run(config_of(store, folder, run__device="cuda", **changes), print)
        warmup.warm_up(this)
        for batch in this.loader:
            this.step(batch)
    runs.Compiler = make
    return {"graphs": this.compiler.graphs, "recompiles": this.compiler.recompiles, "step": this.at.step}


def whole(store, folder, case):
    """A run with everything, stopped and gone on with, that meets a step which is not finite."""
    changes = {"batch__micro_batch_tokens": "auto", "optimizer__clipping": "adagc", "run__compile": False}
    changes |= {"model__layers": 1, "run__epochs": None, "run__total_tokens": 1900}
    config = config_of(
        store,
        folder,
        run__device="cuda",
        run__on_nonfinite=case,
        run__rollback_steps=5,
        run__log_every_steps=4,
        **changes,
    )
    update, fetch, told = runs.Run.update, Pending.fetch, []

    def stopped(self, batch):
        if batch.step == 16:
            raise KeyboardInterrupt
        return update(self, batch)

    def fetched(self):
        done = fetch(self)
        for step in done:
            if step.facts["step"] == 25:
                step.figures[0] |= dict.fromkeys(WATCHED, float("nan"))
        return done

    runs.Run.update, Pending.fetch = stopped, fetched
    with MODE:
        try:
            loop.run(config, warn=told.append)
        except KeyboardInterrupt:
            runs.Run.update = update
        outcome = loop.run(config, warn=told.append)
    Pending.fetch = fetch
    return {"finished": outcome.finished, "unlearnt": outcome.unlearnt, "told": told}


def device(store, folder, case):
    with MODE:
        return str(runs.Run(config_of(store, folder, run__device="cuda"), print).device)


CASES = {"step " + name: steps for name in CHANGES} | {
    "compiled": compiled,
    "compiled, recomputed": compiled,
    "run skip": whole,
    "run rollback": whole,
    "device": device,
}

if __name__ == "__main__":
    installed()
    folder = Path(sys.argv[2])
    store = tiny_store(folder / "store")
    for case in sys.argv[3:] or CASES:
        make = CASES[case]
        result = make(store, folder / case, case.removeprefix("step ").removeprefix("run "))
        print(json.dumps({"case": case, "result": result}), flush=True)
