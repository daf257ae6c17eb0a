"""The learning rate of each step: linear warm-up, cosine decay, constant part, as in NeMo's CosineAnnealing.

It depends on the step alone, so a resumed run needs no scheduler state.
"""

import math


def learning_rate(
    step: int,
    *,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_steps: int,
    constant_steps: int,
    total_steps: int,
) -> float:
    """Return the rate of the update after ``step`` completed optimizer steps (the first update: ``step`` = 0).

    With W warm-up steps, C constant steps, M total steps and D = M − W − C decay steps:

    - C > 0: s ≤ W: max·s/W, so the first update of a run with a warm-up has rate 0; W < s ≤ W + D: half a cosine,
      min + ½(max − min)(1 + cos(π(s − W)/D)); after that min. With D ≤ 0 the rate drops from max to min right after
      the warm-up; the plan warns about this.
    - C = 0: s ≤ W: max·(s + 1)/(W + 1), never 0; then the same cosine over D = M − W steps; beyond M min.
    - W = 0: no warm-up: the first update has rate max, or min if there are no decay steps (D ≤ 0).

    ``constant_steps`` is the constant part at the *end*, at the minimum rate. Raises ValueError for a negative count or
    a minimum above the maximum.
    """
    if min(step, warmup_steps, constant_steps, total_steps) < 0:
        raise ValueError(
            "steps must not be negative: "
            f"step {step}, warm-up {warmup_steps}, constant {constant_steps}, total {total_steps}"
        )
    if not 0 <= min_learning_rate <= max_learning_rate:
        raise ValueError(f"the minimum rate {min_learning_rate} must lie between 0 and the maximum {max_learning_rate}")
    if warmup_steps > 0 and step <= warmup_steps:
        if constant_steps > 0:
            return max_learning_rate * (step / warmup_steps)
        return max_learning_rate * ((step + 1) / (warmup_steps + 1))
    decay_steps = total_steps - warmup_steps - constant_steps
    if decay_steps <= 0 or step > warmup_steps + decay_steps:
        return min_learning_rate
    done = (step - warmup_steps) / decay_steps
    return min_learning_rate + 0.5 * (max_learning_rate - min_learning_rate) * (1 + math.cos(math.pi * done))
