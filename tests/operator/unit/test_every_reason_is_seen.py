"""Every word of a status is seen in some test of the operator: by its name, or through the table of outcomes."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_api.errors import Outcome
from dpo_operator.reasons import Reason

ROOM = Path(__file__).resolve().parents[1]


def test_every_reason_and_event_is_seen_in_a_test() -> None:
    tests = "\n".join(path.read_text() for path in ROOM.rglob("test_*.py") if path != Path(__file__))
    # test_life goes through all outcomes that are permanent, each by its own name.
    assert '[o for o in Outcome if o.retry == "permanent"]' in tests
    swept = {outcome.name for outcome in Outcome if outcome.retry == "permanent"}
    missing = [
        reason.value
        for reason in Reason
        if reason.value not in swept
        and not re.search(rf"""["' :]{reason.value}["' ,:.()\]]|\.{reason.value}\b""", tests)
    ]
    assert missing == []
