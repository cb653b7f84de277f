"""One meaning of what attention may see, in every form that a kernel wants: rows, masked rows, flat spans."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config_of, tiny_store

from curriculum.batch import Batch, with_attention_window
from pipeline.packing import Packed
from train.attention import Sight, attend, has_varlen
from train.config import ModelConfig
from train.data import Flat, micro_batches, row_parts
from train.model import GPT2

ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=6).map(
    lambda rows: [[*spans, 64 - sum(spans)] for spans in rows]
)
CPU = torch.device("cpu")


def batch_of(rows, window=None, positions="kept"):
    """A batch of rows made of spans of such lengths."""
    lengths = np.array([n for spans in rows for n in spans])
    seqlen = sum(rows[0])
    random = np.random.default_rng(len(lengths))
    places = np.concatenate([np.arange(n) for n in lengths]).reshape(-1, seqlen)
    labels = random.integers(0, 50, places.shape)
    labels[0, :3] = -100
    batch = Batch(
        input_ids=random.integers(0, 50, places.shape),
        labels=labels,
        position_ids=places,
        cu_seqlens=np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        max_seqlen=int(lengths.max()),
        step=0,
        seqlen=seqlen,
        targets=labels.size - 3,
        pieces=Packed(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(1)),
    )
    return with_attention_window(batch, window, positions)


def slow_mask(batch, mask):
    """bool [rows, L, L] from the definition."""
    pieces = np.cumsum(batch.position_ids == 0, axis=1) if batch.attention_window_positions == "kept" else None
    if pieces is None:
        pieces = np.searchsorted(batch.cu_seqlens, np.arange(batch.labels.size), side="right").reshape(
            batch.labels.shape
        )
    at = np.arange(batch.seqlen)
    seen = np.broadcast_to(at[:, None] >= at, (*batch.labels.shape, batch.seqlen)).copy()
    if batch.attention_window:
        seen &= at[:, None] // batch.attention_window == at // batch.attention_window
    if mask == "document":
        seen &= pieces[:, :, None] == pieces[:, None, :]
    return torch.from_numpy(seen)


def gradients(model, parts):
    model.zero_grad()
    total = sum(model(*part) for part in parts)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def slow_gradients(model, batch, mask):
    """Of all rows at once, with a mask made by the definition."""
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    positions = torch.from_numpy(batch.position_ids)
    if mask == "causal":
        column = torch.arange(batch.seqlen)
        restart = batch.attention_window and batch.attention_window_positions == "restart"
        positions = (column % batch.attention_window if restart else column).expand_as(ids)
    return gradients(model, [(ids, positions, Sight(mask=slow_mask(batch, mask)[:, None]), labels)])


@settings(max_examples=15, deadline=None)
@given(
    ROWS,
    st.sampled_from(["document", "causal"]),
    st.sampled_from([None, 5, 16, 64]),
    st.sampled_from(["kept", "restart"]),
    st.sampled_from([64, 200, 10**6]),
)
def test_rows_and_the_flat_layout_give_the_loss_and_gradients_of_the_definition(rows, mask, window, positions, size):
    batch = batch_of(rows, window, positions)
    torch.manual_seed(0)
    model = GPT2(ModelConfig(layers=2, width=32, heads=2, mask=mask), 50, 64)
    loss, expected = slow_gradients(model, batch, mask)
    for flat in (None, Flat(20.0)):
        found, ours = gradients(model, micro_batches(batch, size, CPU, mask, flat))
        torch.testing.assert_close(found, loss, atol=1e-3, rtol=1e-5)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


@given(ROWS, st.integers(1, 300))
def test_cu_seqlens_have_one_size_for_a_shape_and_end_in_padding(rows, size):
    flat = Flat(20.0)
    sizes = {}
    for part in micro_batches(batch_of(rows), size, CPU, "document", flat):
        cu_seqlens, tokens = part.sight.cu_seqlens, part.labels.numel()
        assert part.labels.shape == (1, tokens)
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[0] == 0
        assert (cu_seqlens.diff() >= 0).all()
        assert cu_seqlens[-1] == tokens
        assert cu_seqlens.diff().max() <= part.sight.longest == 64
        assert sizes.setdefault(tokens, len(cu_seqlens)) == len(cu_seqlens)


def test_more_spans_than_expected_fit():
    flat = Flat(1000.0)
    usual = flat.capacity(4, 4096, 8)
    assert flat.capacity(4, 4096, usual) == usual
    assert flat.capacity(4, 4096, usual + 1) == 2 * usual


@given(st.integers(1, 30_000), st.integers(1, 100), st.integers(1, 50_000))
def test_parts_are_as_few_as_fit_and_even(rows, seqlen, size):
    parts = row_parts(rows, seqlen, size)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    most = min(max(1, size // seqlen), 8192)
    assert max(sizes) <= most
    assert len(parts) == -(-rows // most)


def test_the_flat_layout_takes_the_variable_length_kernel_on_cuda_only(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert has_varlen(cuda, torch.bfloat16, 64)
    assert not has_varlen(cuda, torch.float32, 64)
    assert not has_varlen(cuda, torch.bfloat16, 60)
    assert not has_varlen(CPU, torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_varlen(cuda, torch.bfloat16, 64)


def test_the_installed_torch_takes_the_call_that_attention_makes():
    """Shapes only, on the meta device: the operator's own schema says whether the arguments fit."""
    from torch.nn.attention.varlen import varlen_attn

    q = torch.empty(10, 2, 8, dtype=torch.bfloat16, device="meta")
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
    assert varlen_attn(q, q, q, cu_seqlens, cu_seqlens, 4, 4, window_size=(-1, 0)).shape == q.shape
    assert attend(q[None], q[None], q[None], Sight(None, cu_seqlens, 4)).shape == (1, 10, 2, 8)


def test_a_run_over_real_batches_is_the_same_in_both_layouts(tmp_path):
    from train import loop

    store = tiny_store(tmp_path / "store")
    config = config_of(store, tmp_path / "run", batch__global_batch_sequences=5)
    this = loop.Run(config, lambda text: None)
    for batch in this.loader:
        a, rows = gradients(this.model, micro_batches(batch, 64, CPU))
        b, flat = gradients(this.model, micro_batches(batch, 64, CPU, "document", Flat(this.store.tokens / 60)))
        torch.testing.assert_close(a, b)
        for name in rows:
            torch.testing.assert_close(flat[name], rows[name], atol=1e-4, rtol=1e-4, msg=name)
        if batch.step == 12:
            break
    this.loader.close()


def test_this_torchs_variable_length_operator_takes_what_a_model_gives_it():
    """By shapes alone, without a GPU: its arguments, and those of its backward pass."""
    with torch.device("meta"):
        model = GPT2(ModelConfig(layers=2, width=128, heads=2), 500, 64).to(torch.bfloat16)
        ids, spans = torch.zeros(1, 256, dtype=torch.int64), torch.zeros(65, dtype=torch.int32)
        loss = model(ids, ids, Sight(None, spans, 64), ids)
    loss.backward()
    assert loss.shape == ()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
