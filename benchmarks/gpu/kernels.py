"""Attention and the LM head against float64: outputs and gradients, on the machine's own kernels."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dpo_api.sizing.head import ALIGNMENT
from dpo_trainer import bridge
from dpo_trainer.kernels.usable import WRONG_SUM, why_not
from dpo_trainer.logprobs import response_log_probs
from dpo_trainer.model.attend import attend, attend_by_piece, form_of
from dpo_trainer.model.rotary import rotation
from dpo_trainer.model.varlen import VarlenPlan, pieces_of, plan_of
from gpu.report import Report
from gpu.world import Pairs

NAMES = ("O", "dQ", "dK", "dV")
FP32_ERROR, BF16_ERROR = 1e-5, 3e-2
"""Largest errors relative to the largest value: rounding of 24 and of 8 bits, in sums of some thousand terms."""

LENGTHS = ((1, 127, 128), (129, 1, 2047), (513, 64, 1), (40, 333, 129))
SMALL_LENGTHS = ((1, 17, 6), (19, 1, 33))


def run(report: Report, small: bool) -> None:
    """Check attention in bf16 and fp32, then Triton's kernels against torch's operations, then the head."""
    place = bridge.device()
    attention(report, place, small)
    math_is_not_used(report, place, small)
    reason = None if small else why_not(place)
    report.require(reason != WRONG_SUM, f"Triton's kernels: {reason}")
    report.add(kernels=reason or "checked")  # where they cannot be built, torch's operations are used: slow, not wrong
    if reason is None:
        softmax(report, place, small)
        rotations(report, place, small)
        activation(report, place, small)
    head(report, place, small)


def exact(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, window: int | None) -> Tensor:
    """What attention is, one sequence at a time, from the plan's intervals alone."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    out, row = [], 0
    for piece in plan.pieces:
        own, keys = q[piece.start : piece.end], slice(row, row + piece.key_count)
        row += piece.key_count
        if piece.padding:
            out.append(torch.zeros_like(own))
            continue
        at = torch.arange(piece.key_count - piece.length, piece.key_count, device=q.device)[:, None]
        column = torch.arange(piece.key_count, device=q.device)[None, :]
        seen = (column <= at) & (column > at - (window or piece.key_count))
        scores = torch.einsum("qhd,khd->hqk", own, k[keys]) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(out).flatten(1)


def with_gradients(work: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The result, and the gradients of its product with ``weight``."""
    out = work(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)]


def errors(found: list[Tensor], right: list[Tensor]) -> list[float]:
    """The largest error of each, relative to the largest value."""
    return [
        float((got.double() - expected).abs().max() / expected.abs().max())
        for got, expected in zip(found, right, strict=True)
    ]


def attention(report: Report, place: torch.device, small: bool) -> None:
    """Each form that runs here against float64. In bf16 one call may err twice as much as torch's own attention."""
    lengths = SMALL_LENGTHS if small else LENGTHS
    pack = Pairs(lengths, 100).packs(range(len(lengths)), 2**20)[0]
    worst: dict[str, float] = {}
    draw = torch.Generator().manual_seed(1)
    widths = [(8, 8, 64), (8, 2, 64), (8, 1, 128)] if small else [(32, 32, 64), (32, 8, 128), (32, 4, 128), (32, 8, 64)]
    for (heads, groups, channels), window, padding in product(widths, (None, 9 if small else 100), (0, 13)):
        if small and padding and window:
            continue
        rows = pack.length + padding
        plan = plan_of(pieces_of(pack.segments, rows), rows)
        shapes = ((rows, heads), (len(plan.keys), groups), (len(plan.keys), groups))
        drawn = [torch.randn(*shape, channels, generator=draw) for shape in shapes]
        weight = torch.randn(rows, heads * channels, generator=draw).to(place)
        plan = plan.to(place)
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [x.to(place, dtype).requires_grad_() for x in drawn]
            wide = [x.detach().double().requires_grad_() for x in inputs]
            right = with_gradients(lambda *x, p=plan, w=window: exact(*x, p, w), wide, weight)  # type: ignore[misc]
            name = f"{heads}:{groups}x{channels}, window {window}, padding {padding}, {str(dtype)[6:]}"
            ours = with_gradients(lambda *x, p=plan, w=window: attend(*x, p, w, None), inputs, weight)  # type: ignore[misc]
            loop = with_gradients(lambda *x, p=plan, w=window: attend_by_piece(*x, p, w, None), inputs, weight)  # type: ignore[misc]
            form = form_of(place, dtype, channels)
            for what, own, other in zip(NAMES, errors(ours, right), errors(loop, right), strict=True):
                rounding = FP32_ERROR if dtype == torch.float32 else BF16_ERROR
                bound = max(2 * other, 1e-3) if form == "varlen" else rounding
                report.within(f"{form} {what} of {name}: its error", own, bound)
                report.within(f"pieces {what} of {name}: its error", other, rounding)
                key = f"{form} {str(dtype)[6:]}"
                worst[key] = max(worst.get(key, 0.0), own)
            if padding:
                report.require(bool((ours[0][-padding:] == 0).all()), f"padding is not 0: {name}")
        report.add(attention_errors=worst)
    same_twice(report, drawn, plan, weight, place)


def same_twice(report: Report, drawn: list[Tensor], plan: VarlenPlan, weight: Tensor, place: torch.device) -> None:
    """With deterministic algorithms two runs give the same bits."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [x.to(place, dtype).requires_grad_() for x in drawn]
            runs = [with_gradients(lambda *x: attend(*x, plan, None, None), inputs, weight) for _ in range(2)]
            for what, one, other in zip(NAMES, *runs, strict=True):
                report.require(torch.equal(one, other), f"{what} in {dtype} is not deterministic")
    finally:
        torch.use_deterministic_algorithms(mode=False)


def math_is_not_used(report: Report, place: torch.device, small: bool) -> None:
    """No form of attention may fall back to torch's quadratic one."""
    lengths = SMALL_LENGTHS if small else LENGTHS[:3]
    pack = Pairs(lengths, 100).packs(range(len(lengths)), 2**20)[0]
    plan = plan_of(pieces_of(pack.segments, pack.length), pack.length).to(place)
    for dtype, window in product((torch.bfloat16, torch.float32), (None, 9)):
        q = torch.randn(pack.length, 8, 64, device=place, dtype=dtype, requires_grad=True)
        k = torch.randn(len(plan.keys), 2, 64, device=place, dtype=dtype, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            attend(q, k, k, plan, window, None).sum().backward()
        names = {event.key for event in profile.key_averages()}
        report.require(
            "aten::_scaled_dot_product_attention_math" not in names,
            f"attention in {dtype} with window {window} takes torch's quadratic form",
        )


def softmax(report: Report, place: torch.device, small: bool) -> None:
    """The head's kernels against torch's operations on the same logits; --smoke interprets them."""
    from dpo_trainer.kernels import head as kernels

    for dtype, columns in product((torch.bfloat16, torch.float32), (501,) if small else (128_256, 151_936, 16_033)):
        rows = 6 if small else 256
        draw = torch.Generator(device=place).manual_seed(3)
        wide = torch.randn(rows, columns + -columns % ALIGNMENT, generator=draw, device=place) * 4
        logits = wide.to(dtype)[:, :columns]
        places = torch.randint(-1, columns, (rows,), generator=draw, device=place)
        exact, at = logits.double(), places.clamp(min=0)[:, None]
        highest = exact.amax(1)
        exps = (exact - highest[:, None]).exp()
        mass, target = exps.sum(1), torch.where(places >= 0, exact.gather(1, at)[:, 0], 0)
        found = [*kernels.statistics(logits, places)]
        exps.scatter_add_(1, at, torch.where(places >= 0, -mass, 0)[:, None])
        kernels.slope_in_place(logits, places, found[0], found[1])
        rights = [highest, mass, target, exps]
        names = ("largest logit", "mass", "label's logit", "slope")
        for what, error in zip(names, errors([*found, logits], rights), strict=True):
            bound = _rounding(dtype, small) if what == "slope" else FP32_ERROR
            report.within(f"the kernels' {what} of {columns} columns in {dtype}: its error", error, bound)


def rotations(report: Report, place: torch.device, small: bool) -> None:
    """Queries turned, and keys turned and copied, against float64; a key's gradient is the sum over its copies."""
    from dpo_trainer.kernels import rotary as kernels

    lengths = SMALL_LENGTHS if small else LENGTHS
    pack = Pairs(lengths, 100).packs(range(len(lengths)), 2**20)[0]
    plan = plan_of(pieces_of(pack.segments, pack.length), pack.length).to(place)
    draw = torch.Generator().manual_seed(4)
    shapes = ((3, 24),) if small else ((8, 128), (32, 64), (3, 24))
    for (heads, width), dtype in product(shapes, (torch.bfloat16, torch.float32)):
        turns = rotation(pack.position_ids.to(place), torch.linspace(1, 0.01, width // 2, device=place))
        drawn = [torch.randn(rows, heads, width, generator=draw) for rows in (pack.length, len(plan.keys))]
        x, slope = (each.to(place, dtype) for each in drawn)
        wide = [each.double() for each in turns]
        right = [turned(x.double(), *wide), turned(x.double(), *wide)[plan.keys]]
        sums = torch.zeros(pack.length, heads, width, dtype=torch.float64, device=place)
        right.append(turned(sums.index_add(0, plan.keys, slope.double()), wide[0], -wide[1]))
        found = [kernels.turned(x, *turns, 1), kernels.turned(x, *turns, 1, plan.keys)]
        found.append(kernels.turned_back(slope, *turns, plan.starts, plan.copies))
        bound = _rounding(dtype, small)
        for what, error in zip(("turned", "turned and copied", "turned back"), errors(found, right), strict=True):
            report.within(f"{heads} heads of {width} in {dtype}, {what}: the error", error, bound)


def activation(report: Report, place: torch.device, small: bool) -> None:
    """SwiGLU and its gradient."""
    from dpo_trainer.kernels import swiglu as kernels

    draw = torch.Generator().manual_seed(5)
    for width, dtype in product((65,) if small else (14_336, 4_865), (torch.bfloat16, torch.float32)):
        drawn = [torch.randn(5, columns, generator=draw) * 3 for columns in (2 * width, width)]
        x, slope = (each.to(place, dtype) for each in drawn)

        def exact(wide: Tensor) -> Tensor:
            gate, up = wide.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        right = with_gradients(exact, [x.double().requires_grad_()], slope)
        found = [kernels.swiglu(x), kernels.swiglu_back(x, slope)]
        for what, error in zip(("SwiGLU", "its gradient"), errors(found, right), strict=True):
            report.within(f"{what} of {width} in {dtype}: the error", error, _rounding(dtype, small))


def _rounding(dtype: torch.dtype, small: bool) -> float:
    """Largest error of a value that a kernel computes in fp32 and stores; the interpreter cuts bits off."""
    return FP32_ERROR if dtype == torch.float32 else 2**-7 if small else 2**-8


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The rotary embedding of [S, heads, d] in the precision of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def head(report: Report, place: torch.device, small: bool) -> None:
    """Log-probs and their gradients against float64, beside those of a matrix of all logits."""
    rows, hidden, vocabulary = (24, 64, 1000) if small else (1024, 2048, 128_256)
    draw = torch.Generator(device=place).manual_seed(2)
    labels = torch.randint(0, vocabulary, (rows,), generator=draw, device=place)
    drawn = [torch.randn(rows, hidden, generator=draw, device=place)]
    drawn.append(torch.randn(vocabulary, hidden, generator=draw, device=place) * 2 / hidden**0.5)
    weight = torch.randn(rows, generator=draw, device=place)

    def whole(x: Tensor, head: Tensor) -> Tensor:
        logits = (x @ head.t()).to(torch.promote_types(x.dtype, torch.float32))
        return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)

    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in drawn]
        right = with_gradients(whole, [x.detach().double().requires_grad_() for x in inputs], weight)
        ours = with_gradients(lambda x, w: response_log_probs(x, w, labels), inputs, weight)
        theirs = with_gradients(whole, inputs, weight)
        found[str(dtype)[6:]] = {"ours": max(errors(ours, right)), "all logits": max(errors(theirs, right))}
        for what, own, other in zip(("log-probs", "dX", "dW"), errors(ours, right), errors(theirs, right), strict=True):
            bound = FP32_ERROR if dtype == torch.float32 else max(2 * other, 1e-3)
            report.within(f"the head's {what} in {dtype}: its error", own, bound)
    report.add(head_errors=found)
