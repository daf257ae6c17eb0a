"""docs/models.md lists the families that can be trained, with every key that they refuse."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_api.models import FAMILIES
from dpo_api.models.rope import TYPES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_family_has_a_row_with_the_keys_that_it_refuses() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)[1:]
    assert [name for name, _ in rows] == list(FAMILIES)
    for name, refused in rows:
        assert FAMILIES[name].refused.keys() <= set(re.findall(r"`(\w+)`", refused)), name


def test_every_rope_type_is_named() -> None:
    section = PAGE.partition("## Rope types")[2].partition("are refused")[0]
    assert set(re.findall(r"`(\w+)`", section)) == {*TYPES, "dynamic", "longrope"}
