"""Attention by sequences against one explicit mask over the whole stream, in float64; what it saves and calls."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_testing import flashattention
from dpo_testing.models import load_model, reference_model, save_folder, shared_pack, single_process, token_stream
from dpo_testing.pairs import Pairs, pack_of
from dpo_trainer.data.packs.collate import make_pack
from dpo_trainer.model.attend import attend, attend_at_once, attend_by_piece, form_of, varlen_kernel
from dpo_trainer.model.attention import PackAttention, PackContext
from dpo_trainer.model.context import sequences_of, share_of
from dpo_trainer.model.forward import hidden_rows
from dpo_trainer.model.pack import Pack, Segment
from dpo_trainer.model.rotary import rotate
from dpo_trainer.model.varlen import Piece, Spread, VarlenPlan, pieces_of, plan_of, spread, window_mask

SHARED = shared_pack(
    [(token_stream(4), token_stream(3), token_stream(2)), (token_stream(2), token_stream(1), token_stream(5))],
    padding=2,
)

FORMS = {
    "shared": pack_of(0, 1, 2, 3),
    "unshared": pack_of(0, 1, 2, 3, share=False),
    "without rejected": pack_of(0, 1, 2, 3, with_rejected=False),
}
HEADS = [(4, 4), (8, 2), (8, 1)]
SIZE = 16  # channels of a head


def test_a_shared_pair_is_two_sequences() -> None:
    """Prompt and chosen are one; rejected sees the prompt's keys too. None crosses a pair."""
    assert pieces_of(SHARED.segments, SHARED.length) == (
        Piece(0, 7, ((0, 7),)),
        Piece(7, 9, ((0, 4), (7, 9))),
        Piece(9, 12, ((9, 12),)),
        Piece(12, 17, ((9, 11), (12, 17))),
        Piece(17, 19, ((17, 19),), padding=True),
    )


def test_a_response_apart_from_its_prompt_is_its_own_sequence() -> None:
    segments = (Segment(0, 4), Segment(4, 6), Segment(6, 9, parent=0), Segment(10, 12, parent=0))
    assert pieces_of(segments, 12) == (
        Piece(0, 4, ((0, 4),)),
        Piece(4, 6, ((4, 6),)),
        Piece(6, 9, ((0, 4), (6, 9))),
        Piece(9, 10, ((9, 10),), padding=True),
        Piece(10, 12, ((0, 4), (10, 12))),
    )


def test_the_plan() -> None:
    plan = plan_of(pieces_of(SHARED.segments, SHARED.length), SHARED.length)
    assert plan.cu_q.tolist() == [0, 7, 9, 12, 17, 19]
    assert plan.cu_k.tolist() == [0, 7, 13, 16, 23, 25]
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32
    assert (plan.max_q, plan.max_k) == (7, 7)
    keys = [*range(7), *range(4), 7, 8, 9, 10, 11, 9, 10, *range(12, 19)]
    assert plan.keys.tolist() == keys
    assert [keys[row] for row in plan.home.tolist()] == list(range(19))
    ((rows, again),) = plan.repeats
    assert rows.tolist() == [0, 1, 2, 3, 9, 10]
    assert again.tolist() == [7, 8, 9, 10, 16, 17]
    assert plan.gathers
    unshared = FORMS["unshared"]
    assert not plan_of(pieces_of(unshared.segments, unshared.length), unshared.length).gathers


def test_spreading_adds_the_gradients_of_all_copies() -> None:
    """Rows that are seen three times, twice, once and never, against plain indexing."""
    pieces = (Piece(0, 3, ((0, 3),)), Piece(3, 5, ((0, 2), (3, 5))), Piece(5, 6, ((1, 2), (3, 4), (5, 6))))
    plan = plan_of(pieces, 8)
    x = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(plan.keys), 2, 3, dtype=torch.float64)
    assert torch.equal(spread(x, plan), x[plan.keys])
    (ours,) = torch.autograd.grad((Spread.apply(x, plan) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((x[plan.keys] * weight).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    assert bool((ours[6:] == 0).all())


def test_window_masks() -> None:
    """Two queries after four keys of a prompt; a window counts the query itself."""
    like = torch.zeros(1, dtype=torch.float64)
    assert window_mask(2, 6, 6, like) is None
    mask = window_mask(2, 6, 3, like)
    assert mask is not None
    assert mask.dtype == torch.float64
    assert mask.exp().int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert mask.stride() == (8, 1)


# -- against the whole mask


def visible(pack: Pack, window: int | None) -> Tensor:
    """Which tokens of the stream each token sees, bool [S, S], from the segments alone."""
    size = pack.length
    segment = torch.full((size,), -1)
    parent = torch.full((size,), -2)
    for index, found in enumerate(pack.segments):
        segment[found.start : found.end] = index
        parent[found.start : found.end] = -2 if found.parent is None else found.parent
    order = torch.arange(size)
    own = (segment[:, None] == segment[None, :]) & (order[:, None] >= order[None, :])
    seen = own | (parent[:, None] == segment[None, :])
    if window is not None:
        seen &= pack.position_ids[:, None] - pack.position_ids[None, :] < window
    return seen & (segment >= 0)[:, None]


def oracle(
    inputs: list[Tensor], pack: Pack, window: int | None, context: PackContext, scale: float = SIZE**-0.5
) -> Tensor:
    """softmax(scale · QKᵀ)V over the whole stream with one mask; zero for padding."""
    q, k, v = (x.squeeze(1) for x in inputs)
    q, k = rotate(q, *context.rotation(0)), rotate(k, *context.rotation(0))
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    seen = visible(pack, window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1).unsqueeze(1)


def attention(window: int | None = None, scale: float | None = None) -> Any:
    return PackAttention(None, 1, None, "self", windows=(window,), ropes=(0,), softmax_scale=scale)


def inputs_of(pack: Pack, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(3)
    return [
        torch.randn(pack.length, 1, count, SIZE, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def with_gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of its product with fixed numbers."""
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [result, *torch.autograd.grad((result * weight.to(result.dtype)).sum(), inputs)]


def context_of(pack: Pack) -> PackContext:
    return PackContext(pack=pack, frequencies=torch.rand(1, SIZE // 2, generator=torch.Generator().manual_seed(5)))


CALLS = pytest.mark.parametrize(
    "calls", [attend, attend_by_piece, attend_at_once], ids=["on CPU", "by piece", "at once"]
)
"""The last two are what GPUs run: here with the CPU's kernels, and with what takes the place of FlashAttention."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for sequences of unlike lengths runs on GPUs only."""
    attend_module = importlib.import_module("dpo_trainer.model.attend")
    monkeypatch.setattr(attend_module, "varlen_kernel", lambda: (flashattention.varlen_attn, True))


CASES = list(product(FORMS, HEADS, (None, 7, 16, 500)))


@pytest.mark.parametrize(("form", "heads", "window"), CASES, ids=[f"{f}-{h}:{g}-{w}" for f, (h, g), w in CASES])
@CALLS
def test_attention_is_that_of_one_mask(
    form: str, heads: tuple[int, int], window: int | None, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, dQ, dK and dV."""
    monkeypatch.setattr("dpo_trainer.model.attention.attend", calls)
    pack, inputs = FORMS[form], inputs_of(FORMS[form], *heads)
    context = context_of(pack)
    ours = with_gradients(attention(window)(*inputs, None, packed_seq_params=context), inputs)
    for got, expected in zip(ours, with_gradients(oracle(inputs, pack, window, context), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert bool((ours[0][pack.used :] == 0).all())


def test_a_torch_whose_flash_attention_has_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are then expanded, and the gradients of the copies added."""
    attend_module = importlib.import_module("dpo_trainer.model.attend")
    monkeypatch.setattr(attend_module, "flash_has_groups", lambda: False)
    pack, inputs = FORMS["shared"], inputs_of(FORMS["shared"], 8, 2)
    context = context_of(pack)
    with Calls() as seen:
        ours = with_gradients(attention()(*inputs, None, packed_seq_params=context), inputs)
    assert {heads for _, _, heads in seen.attention} == {8}
    for got, expected in zip(ours, with_gradients(oracle(inputs, pack, None, context), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@CALLS
@pytest.mark.parametrize("window", [None, 7])
def test_another_scale(calls: Any, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_trainer.model.attention.attend", calls)
    pack, inputs = FORMS["shared"], inputs_of(FORMS["shared"], 8, 2)
    context = context_of(pack)
    ours = with_gradients(attention(window, 0.6)(*inputs, None, packed_seq_params=context), inputs)
    for got, expected in zip(ours, with_gradients(oracle(inputs, pack, window, context, 0.6), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 7])
def test_precisions(dtype: torch.dtype, bound: float, window: int | None) -> None:
    """The error of each precision against float64, relative to the largest value."""
    pack = FORMS["shared"]
    context = context_of(pack)
    inputs = inputs_of(pack, 8, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = with_gradients(attention(window)(*inputs, None, packed_seq_params=context), inputs)
    for got, expected in zip(ours, with_gradients(oracle(exact, pack, window, context), exact), strict=True):
        assert got.dtype == dtype
        assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_sequences_may_be_cut_into_chunks() -> None:
    """Queries [a, b) of a segment see their parent and the segment up to b: the form of context parallelism."""
    pack, (heads, groups) = FORMS["shared"], (8, 2)
    context = context_of(pack)
    inputs = inputs_of(pack, heads, groups)
    chunks = tuple(chunk for piece in context.plan.pieces for chunk in _cut(piece))
    assert len(chunks) > len(context.plan.pieces)
    expected = with_gradients(attention()(*inputs, None, packed_seq_params=context), inputs)
    context = context_of(pack)
    context.plan = plan_of(chunks, pack.length)
    assert len(context.plan.repeats) > 1
    for got, whole in zip(
        with_gradients(attention()(*inputs, None, packed_seq_params=context), inputs), expected, strict=True
    ):
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


def _cut(piece: Piece) -> list[Piece]:
    """The piece as up to three chunks of its queries."""
    bounds = sorted({piece.start + piece.length * part // 3 for part in range(4)})
    *before, (first, _) = piece.keys
    return [replace(piece, start=a, end=b, keys=(*before, (first, b))) for a, b in pairwise(bounds)]


def test_nothing_leaks_between_responses() -> None:
    """A rejected response's output gives no gradient to the chosen one's keys and values, nor the reverse."""
    pack = FORMS["shared"]
    inputs = inputs_of(pack, 8, 2)
    out = attention()(*inputs, None, packed_seq_params=context_of(pack))
    prompt, chosen, rejected = pack.segments[:3]
    for asked, other in ((rejected, chosen), (chosen, rejected)):
        gradients = torch.autograd.grad(out[asked.start : asked.end].square().sum(), inputs[1:], retain_graph=True)
        for gradient in gradients:
            touched = gradient.flatten(1).abs().amax(1) > 0
            assert not touched[other.start : other.end].any()
            assert touched[prompt.start : prompt.end].all()
            assert touched[asked.start : asked.end].all()
            assert touched.sum() == prompt.length + asked.length


# -- one call for all sequences


def test_torchs_kernel_takes_what_we_pass() -> None:
    """Its own function, on tensors without storage: shapes and dtypes of outputs and gradients, with 2 groups."""
    pack = FORMS["shared"]
    plan = plan_of(pieces_of(pack.segments, pack.length), pack.length).to("meta")
    kernel, has_groups = varlen_kernel.__wrapped__()
    assert kernel is not flashattention.varlen_attn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_trainer.model.attend.varlen_kernel", lambda: (kernel, has_groups))
        for window in (None, 7):
            query, key, value = (
                torch.empty(rows, heads, SIZE, dtype=torch.bfloat16, device="meta", requires_grad=True)
                for rows, heads in ((pack.length, 8), (len(plan.keys), 2), (len(plan.keys), 2))
            )
            out = attend_at_once(query, key, value, plan, window, None)
            assert out.shape == (pack.length, 8 * SIZE)
            for gradient, of in zip(
                torch.autograd.grad(out.sum(), (query, key, value)), (query, key, value), strict=True
            ):
                assert (gradient.shape, gradient.dtype) == (of.shape, of.dtype)


def test_a_kernel_without_a_parameter_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch 2.11: fewer key heads are handed on."""
    pack, inputs = FORMS["shared"], inputs_of(FORMS["shared"], 8, 2)
    plan = context_of(pack).plan
    q, k, v = (x.squeeze(1) for x in inputs)
    expected = attend(q, spread(k, plan), spread(v, plan), plan, None, None)
    monkeypatch.setattr("dpo_trainer.model.attend.varlen_kernel", lambda: (flashattention.without_head_check, False))
    found = attend_at_once(q, spread(k, plan), spread(v, plan), plan, None, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype", "channels", "capability", "form"),
    [
        ("cpu", torch.bfloat16, 128, (9, 0), "cpu"),
        ("cuda", torch.bfloat16, 128, (9, 0), "varlen"),
        ("cuda", torch.float16, 256, (8, 0), "varlen"),
        ("cuda", torch.float32, 128, (9, 0), "pieces"),
        ("cuda", torch.bfloat16, 264, (9, 0), "pieces"),
        ("cuda", torch.bfloat16, 124, (9, 0), "pieces"),
        ("cuda", torch.float16, 128, (7, 5), "pieces"),
    ],
)
def test_which_form_a_device_has(
    kind: str,
    dtype: torch.dtype,
    channels: int,
    capability: tuple[int, int],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert form_of(torch.device(kind), dtype, channels) == form


@st.composite
def plans(draw: st.DrawFn) -> tuple[VarlenPlan, int]:
    """Sequences of a random pack, or of one of the ranks that share it; and how many keys its ranks have."""
    numbers = st.integers(1, 40)
    sizes = draw(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=4))
    pack = make_pack(
        Pairs(sizes),
        range(len(sizes)),
        share=draw(st.booleans()),
        with_rejected=draw(st.booleans()),
        pad_to_multiple=draw(st.sampled_from([1, 8, 32])),
    )
    ranks = draw(st.sampled_from([1, 1, 2, 3]))
    own = share_of(pack, draw(st.integers(0, ranks - 1)), ranks, 4)
    return plan_of(sequences_of(own), ranks * own.length), own.length


def outputs_and_gradients(
    calls: Any, plan: VarlenPlan, rows: int, heads: tuple[int, int], window: int | None
) -> list[Tensor]:
    """The output, dQ, dK and dV of random queries, keys and values."""
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, heads[0]), (len(plan.keys), heads[1]), (len(plan.keys), heads[1]))
    inputs = [torch.randn(*shape, 8, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out = calls(*inputs, plan, window, None)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@given(plans(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.one_of(st.none(), st.integers(1, 60)))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_call_is_the_loop_over_pieces(
    drawn: tuple[VarlenPlan, int], heads: tuple[int, int], window: int | None
) -> None:
    """Outputs and all gradients, over random packs, shares of packs, windows, groups and padding."""
    plan, rows = drawn
    found = outputs_and_gradients(attend_at_once, plan, rows, heads, window)
    for got, expected in zip(found, outputs_and_gradients(attend_by_piece, plan, rows, heads, window), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for piece, first in zip(plan.pieces, plan.cu_q.tolist(), strict=False):
        if piece.padding:
            assert bool((found[0][first : first + piece.length] == 0).all())


def test_a_wrong_window_shows() -> None:
    """By one key: the loop's result is another one then, so the property above would fail."""
    plan, rows = context_of(FORMS["shared"]).plan, FORMS["shared"].length
    exact = outputs_and_gradients(attend_by_piece, plan, rows, (4, 2), 7)
    for window in (6, 8):
        for right, wrong in zip(exact, outputs_and_gradients(attend_at_once, plan, rows, (4, 2), window), strict=True):
            assert float((right - wrong).abs().max()) > 0.01


def test_a_chosen_response_that_rejected_sees_shows() -> None:
    segments = FORMS["shared"].segments
    rows = FORMS["shared"].length
    right = context_of(FORMS["shared"]).plan
    leaks = [
        replace(piece, keys=((segments[0].start, segments[1].end), piece.keys[1])) if index == 1 else piece
        for index, piece in enumerate(right.pieces)
    ]
    own = [slice(piece.start, piece.end) for piece in right.pieces]
    wrong = plan_of(leaks, rows)
    x = torch.randn(3, rows, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = (attend_at_once(x[0], spread(x[1], p), spread(x[2], p), p, None, None) for p in (right, wrong))
    assert torch.equal(one[own[0]], other[own[0]])
    assert float((one[own[1]] - other[own[1]]).abs().max()) > 0.01


# -- what is called and saved


class Calls(TorchDispatchMode):
    """Records every operation whose name says that it is attention or its parts, with its tensors' shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[tuple[str, Any, int]] = []  # name, mask, heads of the keys
        self.softmax = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "attention" in name:
            key = args[2] if name.endswith("backward") else args[1]
            self.attention.append((name, (kwargs or {}).get("attn_mask"), key.shape[1]))
        self.softmax += "softmax" in name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize(("variant", "masked"), [("qwen3", 0), ("llama", 0), ("qwen2-window", 2)])
def test_only_windows_are_masked(variant: str, masked: int, tmp_path: Any) -> None:
    """A model's forward and backward passes call flash attention only, with a mask in windowed layers only.

    Each pair takes a causal call for prompt and chosen, and two for rejected: the prompt's keys, and its own.
    """
    model = load_model(save_folder(reference_model(variant), tmp_path))
    pack = pack_of(0, 2)
    with Calls() as seen:
        hidden_rows(model, pack).sum().backward()
    layers = model.config.num_layers
    assert seen.softmax == 0
    assert {name.removesuffix("_backward") for name, _, _ in seen.attention} == {
        "aten::_scaled_dot_product_flash_attention_for_cpu"
    }
    plain = [mask for _, mask, _ in seen.attention if mask is None]
    windowed = [mask for _, mask, _ in seen.attention if mask is not None]
    assert len(plain) == 2 * 6 * (layers - masked)
    assert len(windowed) == 2 * 4 * masked
    assert len({mask.data_ptr() for mask in windowed}) == (4 if masked else 0)


@contextmanager
def saved_tensors(found: list[Tensor]) -> Iterator[None]:
    """Record what is saved for the backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [8, 2])
def test_a_layer_saves_queries_keys_values_and_outputs_alone(dtype: torch.dtype, groups: int) -> None:
    """Per token: rotated queries and keys, values and outputs, and a log-sum-exp a head; prompts' keys twice."""
    pack, heads = FORMS["shared"], 8
    context = context_of(pack)
    layer = attention()
    first: list[Tensor] = []
    second: list[Tensor] = []
    with saved_tensors(first):
        kept = layer(*inputs_of(pack, heads, groups, dtype), None, packed_seq_params=context)
    with saved_tensors(second):
        kept = (kept, layer(*inputs_of(pack, heads, groups, dtype), None, packed_seq_params=context))
    own = {pointer: size for pointer, size in storages(second).items() if pointer not in storages(first)}
    prompts = sum(s.length for s in pack.segments if s.parent is None)
    keys = pack.length + prompts
    assert len(context.plan.keys) == keys
    channels = 2 * heads * pack.length + 2 * groups * keys
    assert sum(own.values()) == channels * SIZE * dtype.itemsize + 4 * heads * pack.used
    scores = {(piece.length, piece.key_count) for piece in context.plan.pieces}
    assert not [tensor.shape for tensor in second if tensor.shape[-2:] in scores]


def test_a_window_saves_one_mask_for_all_layers() -> None:
    pack = FORMS["shared"]
    context = context_of(pack)
    layer: Callable[..., Tensor] = attention(7)
    inputs = inputs_of(pack, 8, 2, torch.float32)
    layer(*inputs, None, packed_seq_params=context)
    made = context.plan.masks(7, inputs[0])
    layer(*inputs, None, packed_seq_params=context)
    assert context.plan.masks(7, inputs[0]) is made
    sizes = {(piece.length, piece.key_count) for piece in context.plan.pieces if not piece.padding}
    assert len({mask.data_ptr() for mask in made if mask is not None}) == sum(keys > 7 for _, keys in sizes)
