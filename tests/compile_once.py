"""Compiles, in a fresh environment, what each process of the tests would else compile while another does.

`python tests/compile_once.py modules` does it for Python's modules, `... kernels` for those of numba.
"""

import importlib
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path

MODULES = (
    "torch",
    "datasets",
    "numba",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "transformers.trainer",
    "accelerate",
    "torch._inductor.compile_fx",
    "gcsfs",
    "ray",
)


def modules():
    missing = [name for name in MODULES if not compiled(name.partition(".")[0])]
    warnings.simplefilter("ignore")
    for name in missing:
        importlib.import_module(name)


def compiled(package):
    return Path(importlib.util.find_spec(package).cached).exists()


def kernels():
    from stores import documents_of, write_store

    from curriculum.loader import CurriculumLoader
    from curriculum.schedule import Schedule
    from pipeline.packing import pack
    from pipeline.reader import Store

    with tempfile.TemporaryDirectory() as name:
        write_store(Path(name), documents_of([5, 30, 9, 70, 12, 44]))
        store = Store.open(name)
        schedule = Schedule.constant(seqlen=8, global_batch_sequences=3, epochs=1)
        with CurriculumLoader(store, schedule, seed=1) as loader:
            state = [loader.state_dict() for _ in loader][2]
        with CurriculumLoader(store, schedule, seed=1) as again:
            again.load_state_dict(state)
            next(again)
        pack(store.lengths, 8)


if __name__ == "__main__":
    {"modules": modules, "kernels": kernels}[sys.argv[1]]()
