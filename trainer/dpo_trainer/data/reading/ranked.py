"""The records of one row: a pair, a ranked list of completions, or two responses with a preference score."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from dpo_api.spec import Columns, Data
from dpo_trainer.data.problems import Problem, Reason, UnusableError, kind_of
from dpo_trainer.data.reading import records
from dpo_trainer.data.reading.records import Record

MOST = 64
"""Completions of one record; with ``pairs: all`` they make up to 2,016 pairs."""


def records_of(row: Mapping[str, Any], data: Data, *, rejected_needed: bool = True) -> list[Record] | Problem:
    """Read one row; never an empty list.

    ``rejected_needed=False`` is SFT alone: a list gives its best completion.
    """
    form = _form(row, data.columns)
    if form == "pair":
        found = records.record_of(row, data.columns, rejected_needed=rejected_needed)
        return found if isinstance(found, Problem) else [found]
    made: list[Record] = []
    try:
        pairs = _ranked(row, data, rejected_needed) if form == "ranked" else _compared(row, data)
        for pair, columns in pairs:
            found = records.record_of(pair, columns, rejected_needed=rejected_needed)
            if isinstance(found, Problem):
                return found
            made.append(found)
    except UnusableError as error:
        return error.problem
    return made


def names_read(columns: Columns, *, rejected_needed: bool = True) -> frozenset[str]:
    """Return the keys of a row that ``records_of`` may read."""
    more = ("completions", "scores", "ranks", "preference", "response1", "response2")
    return records.names_read(columns, rejected_needed=rejected_needed).union(
        *(records.keys_of(role, columns) for role in more), records.keys_of("context", columns)
    )


def _form(row: Mapping[str, Any], columns: Columns) -> str:
    """What the columns name decides; without names, what the row holds."""
    if columns.completions or columns.scores or columns.ranks:
        return "ranked"
    if columns.preference or columns.response1 or columns.response2:
        return "compared"
    if columns.chosen or records.find(row, "chosen", None)[1] is not None:
        return "pair"
    if records.find(row, "completions", None)[1] is not None:
        return "ranked"
    return "pair" if records.find(row, "preference", None)[1] is None else "compared"


def _ranked(row: Mapping[str, Any], data: Data, rejected_needed: bool) -> Iterator[tuple[Mapping[str, Any], Columns]]:
    columns = data.columns
    key, completions = records.required(row, "completions", columns.completions)
    if not isinstance(completions, list):
        raise UnusableError(Reason.WRONG_TYPE, f'"{key}" is {kind_of(completions)}, expected a list of completions')
    if len(completions) > MOST:
        raise UnusableError(Reason.BAD_RANKING, f'"{key}" has {len(completions)} completions, more than {MOST}')
    for position, completion in enumerate(completions):
        if completion is None:
            raise UnusableError(Reason.WRONG_TYPE, f'"{key}"[{position}] is null, expected a string or messages')
    name, values, best_is_lowest = _values(row, columns, len(completions), key)
    order = sorted(range(len(values)), key=lambda at: (values[at] if best_is_lowest else -values[at], at))
    chosen = [(order[0], order[0])] if not rejected_needed else _pairs(order, values, data.pairs)
    if not chosen:
        raise UnusableError(Reason.TIE, f'"{name}" ranks no completion above another, so that there is no pair')
    for better, worse in chosen:
        # A key's whole name comes before its meaning as a path: these name the completions in messages, too.
        pair = {**row, f"{key}[{better}]": completions[better], f"{key}[{worse}]": completions[worse]}
        update = {"chosen": f"{key}[{better}]", "rejected": f"{key}[{worse}]"}
        pair |= {"chosen_reward": None, "rejected_reward": None}
        if not best_is_lowest:
            pair |= {"chosen_reward": values[better], "rejected_reward": values[worse]}
        yield pair, columns.model_copy(update={**update, "chosen_reward": None, "rejected_reward": None})


def _values(row: Mapping[str, Any], columns: Columns, count: int, of: str) -> tuple[str, list[float], bool]:
    """The key of the scores or ranks, the numbers, and whether they are ranks."""
    ranked = bool(columns.ranks) or (not columns.scores and records.find(row, "scores", None)[1] is None)
    role = "ranks" if ranked else "scores"
    if ranked and not columns.ranks and records.find(row, "ranks", None)[1] is None:
        role = "scores"  # neither is there: the message asks for scores
    key, values = records.required(row, role, getattr(columns, role))
    if not isinstance(values, list):
        raise UnusableError(Reason.BAD_RANKING, f'"{key}" is {kind_of(values)}, expected a list of numbers')
    if len(values) != count or not values:
        raise UnusableError(Reason.BAD_RANKING, f'"{key}" has {len(values)} elements, and "{of}" has {count}')
    for position, value in enumerate(values):
        records.check_number(f'"{key}"[{position}]', value, Reason.BAD_RANKING)
    return key, [float(value) for value in values], ranked


def _pairs(order: Sequence[int], values: Sequence[float], policy: str) -> list[tuple[int, int]]:
    """Positions of (better, worse), from the best completion to the worst. Equals make no pair."""
    if policy == "bestWorst":
        found: list[tuple[int, int]] = [(order[0], order[-1])]
    else:
        found = list(pairwise(order) if policy == "adjacent" else combinations(order, 2))
    return [(better, worse) for better, worse in found if values[better] != values[worse]]


def _compared(row: Mapping[str, Any], data: Data) -> Iterator[tuple[Mapping[str, Any], Columns]]:
    columns = data.columns
    key, value = records.required(row, "preference", columns.preference)
    records.check_number(f'"{key}"', value, Reason.BAD_RANKING)
    if value == 0:
        raise UnusableError(Reason.TIE, f'"{key}" is 0, so that there is no pair')
    first, _ = records.required(row, "response1", columns.response1)
    second, _ = records.required(row, "response2", columns.response2)
    better, worse = (first, second) if value < 0 else (second, first)
    margin = {"chosen_reward": math.fabs(value), "rejected_reward": 0.0} if data.preference_margin else {}
    prompt = columns.prompt
    if prompt is None and records.find(row, "prompt", None)[1] is None:
        prompt = records.find(row, "context", None)[0]
    names = {"prompt": prompt, "chosen": better, "rejected": worse}
    if margin:
        names |= {"chosen_reward": None, "rejected_reward": None}
    yield {**row, **margin}, columns.model_copy(update=names)
