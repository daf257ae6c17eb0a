"""How a model's layers are divided among the stages of pipeline parallelism."""

from __future__ import annotations


def layers_of_stages(layers: int, stages: int) -> tuple[range, ...]:
    """Return the layers of each stage, counted from 0: equal numbers, or one more on the first stages.

    The last stage has the LM head too, so it never has more layers than another. ``stages`` is at most ``layers``.
    """
    each, more = divmod(layers, stages)
    ends = [each * (stage + 1) + min(stage + 1, more) for stage in range(stages)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))
