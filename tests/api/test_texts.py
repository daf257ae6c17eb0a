"""Numbers, counts, sizes and durations as text: one table a form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_api import texts

TABLES: list[tuple[Callable[..., str], list[tuple[float, str]]]] = [
    (
        texts.number,
        [(9e-6, "9e-6"), (9e-7, "9e-7"), (0.1, "0.1"), (1.0, "1"), (0.00012, "0.00012"), (1e10, "1e10"), (0, "0"),
         (-2.5, "-2.5"), (9.000000000000001e-07, "9e-7"), (1e-100, "1e-100")],
    ),
    (
        texts.compact,
        [(0, "0"), (0.0712, "0.0712"), (3.14159, "3.14"), (9e-7, "9e-7"), (1.239e-4, "0.000124"), (12340, "12.3k"),
         (1.5e6, "1.5M"), (-250, "-250"), (2e9, "2G"), (3e12, "3T"), (1e16, "1e16"), (999.4, "999"), (9999, "9999")],
    ),
    (
        texts.figure,
        [(0.6931, "0.693"), (-3.14159, "-3.14"), (3.1, "3.10"), (12.34, "12.3"), (12345, "12,345"), (0, "0.000"),
         (3e-5, "3e-5"), (3.14e-5, "3.1e-5")],
    ),
    (texts.percent, [(0.975, "97.5%"), (1, "100.0%"), (0, "0.0%")]),
    (texts.grouped, [(1_000_000, "1,000,000"), (12.0, "12"), (0.5, "0.5"), (1e-6, "1e-6")]),
    (
        texts.size,
        [(0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_258_291, "1.2 MiB"),
         (1024**2 - 1, "1.0 MiB"), (16.1 * 1024**3, "16.1 GiB"), (1024**4, "1.0 TiB"), (5000 * 1024**5, "5000.0 PiB")],
    ),
    (texts.clock, [(9, "0:09"), (59.6, "1:00"), (125, "2:05"), (3599.6, "1:00:00"), (11220, "3:07:00"), (-1, "0:00")]),
    (
        texts.elapsed,
        [(0.42, "0.4 s"), (9, "9.0 s"), (9.96, "10 s"), (41, "41 s"), (59.6, "1:00 min"), (125, "2:05 min"),
         (3599.6, "1:00:00 h"), (11220, "3:07:00 h")],
    ),
    (
        texts.age,
        [(-3, "0s"), (45, "45s"), (60, "1m"), (725, "12m"), (3600, "1h0m"), (11_520, "3h12m"), (446_400, "5d4h")],
    ),
]  # fmt: skip
CASES = [pytest.param(form, value, text, id=f"{form.__name__} {text}") for form, rows in TABLES for value, text in rows]


@pytest.mark.parametrize(("form", "value", "text"), CASES)
def test_a_value_is_written(form: Callable[[float], str], value: float, text: str) -> None:
    assert form(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (12_000, "12,000 steps")])
def test_things_are_counted(count: int, text: str) -> None:
    assert texts.counted(count, "step") == text


def test_a_noun_may_have_a_plural_of_its_own() -> None:
    assert (texts.counted(1, "process", "processes"), texts.counted(2, "process", "processes")) == (
        "1 process",
        "2 processes",
    )


def test_decimals_are_fixed_as_long_as_there_is_room() -> None:
    assert (texts.fixed(0.69314, 4), texts.fixed(2, 2)) == ("0.6931", "2.00")
    assert texts.fixed(1.5e20, 2) == "1.5e+20"
    assert len(texts.fixed(-1.234e300, 2)) <= 16


def test_numbers_that_a_text_compares_look_different_if_they_are() -> None:
    assert texts.numbers(9e-6, 9e-7) == ("9e-6", "9e-7")
    assert texts.numbers(1e-5, 1.00000001e-5) == ("1e-5", "1.00000001e-5")
    assert texts.numbers(1e-5, 1e-5) == ("1e-5", "1e-5")
    assert texts.numbers(0.1, 0.1 + 2**-55) == ("0.10000000000000001", "0.10000000000000003")
    assert texts.numbers(0.0, -0.0) == ("0", "0")
    assert texts.numbers(0.6931, 0.7, digits=3) == ("0.693", "0.7")


def test_sizes_that_a_text_compares_look_different_if_they_are() -> None:
    assert texts.sizes(1024, 2048) == ("1.0 KiB", "2.0 KiB")
    assert texts.sizes(1024, 1024) == ("1.0 KiB", "1.0 KiB")
    assert texts.sizes(1_073_741_824, 1_073_741_900) == ("1,073,741,824 B", "1,073,741,900 B")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=3))
def test_numbers_look_the_same_exactly_if_they_are(values: list[float]) -> None:
    written = texts.numbers(*values)
    assert len(set(written)) == len(set(values))
    for value, text in zip(values, written, strict=True):
        assert math.isclose(float(text), value, rel_tol=1e-5, abs_tol=1e-320)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256Gi", 256 * 2**30),
        ("500m", 0.5),
        ("32", 32),
        ("1.5G", 1.5e9),
        ("2Ki", 2048),
        ("7k", 7000),
        ("3Ei", 3 * 2**60),
    ],
)
def test_a_quantity_has_a_value(text: str, value: float) -> None:
    assert texts.quantity(text) == value
