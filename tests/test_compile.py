"""Compiled is the same as eager, in a bounded number of graphs, none of them made after the warm-up."""

import pytest
import torch
import torch.distributed as dist
from test_attention import CPU, batch_of

from train.attention import Sight
from train.compile import Compiler, sizes_of
from train.config import ModelConfig
from train.data import Flat, micro_batches
from train.model import GPT2

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracing
SETTINGS = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit", "optimize_ddp")
"""Of torch._dynamo.config, changed by `train.compile`."""
LENGTHS = range(64, 0, -3)
"""A ramp of 22 lengths, as warm-up goes through it: the longest first."""


@pytest.fixture(autouse=True)
def fresh():
    """Graphs and settings of this test only."""
    settings = {name: getattr(torch._dynamo.config, name) for name in SETTINGS}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.compiler.set_stance("default")
    for name, value in settings.items():
        setattr(torch._dynamo.config, name, value)
    torch.fx.experimental._config.use_duck_shape = True


def models(**config):
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(GPT2(ModelConfig(layers=2, width=16, heads=2, **config), 50, 64))
    return made


def parts_of(seqlen, flat, mask="document", tokens=128):
    """Micro-batches of a length: of whole rows, and of rows of several spans."""
    rows = max(1, tokens // seqlen)
    for spans in ([[seqlen]] * rows, [[seqlen // 2, seqlen - seqlen // 2]] * rows if seqlen > 1 else []):
        if spans:
            yield from micro_batches(batch_of(spans), tokens, CPU, mask, flat)


def assert_same_step(compiled, eager, part):
    losses = [model(*part) for model in (compiled, eager)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-5)
    for ours, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-4, rtol=1e-4)
    for model in (compiled, eager):
        model.zero_grad()


@pytest.mark.parametrize(("flat", "positions"), [(None, "learned"), (Flat(20.0), "rope")], ids=["rows", "flat"])
def test_a_ramp_takes_few_graphs_and_none_after_the_warm_up(flat, positions):
    compiled, eager = models(positions=positions)
    compiler = Compiler(compiled, "aot_eager")
    for seqlen in (64, 1):
        for part in parts_of(seqlen, flat):
            compiled(*part).backward()
        with torch.no_grad():
            compiled(*part)
    compiler.warmed_up()
    compiled.zero_grad()
    torch.compiler.set_stance("fail_on_recompile")
    for seqlen in LENGTHS:
        for part in parts_of(seqlen, flat):
            assert_same_step(compiled, eager, part)
    assert compiler.recompiles == 0
    assert compiler.graphs <= 12


def test_static_shapes_have_graphs_of_their_own_and_others_share_one():
    compiled, eager = models()
    compiler = Compiler(compiled, "aot_eager")
    parts = {seqlen: list(parts_of(seqlen, Flat(20.0))) for seqlen in (64, 48, 40, 24)}
    compiler.static = {sizes_of(part.input_ids, part.sight) for part in parts[64]}
    made = []
    for seqlen in (64, 48, 40, 24, 64):
        before = compiler.graphs
        for part in parts[seqlen]:
            assert_same_step(compiled, eager, part)
        made.append(compiler.graphs - before)
    assert made[0] > 0
    assert made[1] > 0
    assert made[2:] == [0, 0, 0]


def test_what_was_not_warmed_up_is_counted():
    compiled, _ = models()
    compiler = Compiler(compiled, "aot_eager")
    assert compiler.recompiles == 0
    ids = torch.zeros((2, 8), dtype=torch.int64)
    compiled(ids, ids, Sight(), ids).backward()
    compiler.warmed_up()
    assert compiler.recompiles == 0
    part = next(micro_batches(batch_of([[3, 5], [8]]), 64, CPU))
    compiled(*part).backward()
    assert compiler.recompiles > 0


def test_at_the_limit_there_is_an_error_and_no_silent_eager(monkeypatch):
    monkeypatch.setattr("train.compile.LIMIT", 2)
    compiled, _ = models()
    compiler = Compiler(compiled, "aot_eager")
    parts = [next(micro_batches(batch_of([[n]] * 2), 200, CPU)) for n in (8, 16, 24)]
    compiler.static = {sizes_of(part.input_ids, part.sight) for part in parts}
    for part in parts[:1]:
        compiled(*part).backward()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for part in parts[1:]:
            compiled(*part).backward()


def test_replicas_share_the_graphs_that_one_has():
    """Of blocks larger than the buckets in which DDP adds up gradients, the first of 1 MiB."""
    ids = torch.zeros((2, 8), dtype=torch.int64)

    def graphs(spread):
        torch._dynamo.reset()
        model = GPT2(ModelConfig(layers=1, width=256, heads=4), 50, 64)
        compiler = Compiler(model, "aot_eager")
        spread(model)(ids, ids, Sight(), ids).backward()
        return compiler.graphs

    alone = graphs(lambda model: model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert graphs(torch.nn.parallel.DistributedDataParallel) == alone
    finally:
        dist.destroy_process_group()


def test_state_is_named_as_without_compilation():
    compiled, eager = models()
    Compiler(compiled, "aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in eager.named_parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_gives_the_same_step(monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)  # kernels without vectors compile sooner
    compiled, eager = models()
    Compiler(compiled)
    for part in list(parts_of(16, None, tokens=32))[1:]:  # one of spans: each form takes seconds
        assert_same_step(compiled, eager, part)
