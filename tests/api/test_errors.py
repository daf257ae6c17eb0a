"""The table of outcomes: one exit code and one class of errors for each."""

from __future__ import annotations

import pytest

from dpo_api.errors import InvalidDataError, Outcome


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.Succeeded])
def test_an_outcome_knows_its_error(outcome: Outcome) -> None:
    error = outcome.error("why")
    assert (error.outcome, error.exit_code, str(error)) == (outcome, outcome.exit_code, "why")
    assert type(error).__name__ == f"{outcome.name}Error"


def test_success_has_no_error() -> None:
    with pytest.raises(KeyError):
        _ = Outcome.Succeeded.error


def test_a_subclass_does_not_take_its_parents_place() -> None:
    import dpo_store.errors  # noqa: F401 - it defines a subclass of InvalidDataError

    assert Outcome.InvalidData.error is InvalidDataError
