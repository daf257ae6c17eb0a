"""How often an epoch uses the pairs of each source."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dpo_api.errors import InvalidSpecError
from dpo_api.texts import counted


def uses_per_epoch(pairs: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many pairs of each source an epoch takes, [sources]; they add up to ``sum(pairs)``.

    ``pairs`` [sources]: usable pairs of each; ``weights`` [sources]: relative, of one pair. A source of n pairs and
    weight w takes ``sum(pairs) · w·n / Σ w·n`` of them, rounded by largest remainder (ties: the earlier source).
    Equal weights take each pair once. The arithmetic is exact, so it is the same everywhere. Raises InvalidSpecError if
    a source that has pairs would take none.
    """
    total = sum(pairs)
    parts = [Fraction(repr(float(weight))) * count for weight, count in zip(weights, pairs, strict=True)]
    whole = sum(parts) or Fraction(1)
    exact = [total * part / whole for part in parts]
    uses = [int(share) for share in exact]
    by_remainder = sorted(range(len(uses)), key=lambda number: (uses[number] - exact[number], number))
    for number in by_remainder[: total - sum(uses)]:
        uses[number] += 1
    for number, (count, used) in enumerate(zip(pairs, uses, strict=True)):
        if count and not used:
            raise InvalidSpecError(
                f"spec.data.train[{number}].weight: {weights[number]:g} leaves its {counted(count, 'pair')} less than"
                f" one of the {total:,} uses of an epoch; raise it, or leave the source out"
            )
    return tuple(uses)


def mean_weights(pairs: Sequence[int], weights: Sequence[float]) -> tuple[float, ...]:
    """Return the factor of each source in a mean over all of them, [sources]: 1 for all if the weights are equal.

    ``pairs`` [sources]: the pairs that the mean covers. The factors are scaled so that they do not change their number.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    whole = sum((weight * count for weight, count in zip(exact, pairs, strict=True)), Fraction(0))
    scale = sum(pairs) / whole if whole else Fraction(1)
    return tuple(float(weight * scale) for weight in exact)
