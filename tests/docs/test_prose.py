"""The prose of docs, comments and messages uses plain words: each pattern here has a plain replacement."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORDS = {
    r"told": "says, reports, distinguished",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"befalls?": "happens to",
    r"whoever": "anyone who",
    r"begun": "started",
    r"so many": "the number",
    r"nothing else": "only",
    r"laid over": "applied to, merged into",
    r"the house": "the project",
    r"rooms": "packages",
    r"last words": "termination message",
    r"lies in": "is in",
    r"one (?:sees|may|can do)": "you see, you can",
    r"stands?": "is, appears",
    r"a (?:pair|node|step|process|job|minute|second|day|token) a (?:pair|step|second|minute|day|job)": "per",
}
"""Patterns of whole words, matched without regard to case, with what to write instead."""

ALLOWED = {
    "stands for": "an abbreviation stands for something",
    "stand for": "an abbreviation stands for something",
}
"""Phrases that may hold one of the words, and why."""

GENERATED = {"docs/api.md", "docs/operations.md", "docs/dashboards.md"}
"""Pages that repeat texts of the code: the code is what to correct."""

_PATTERN = re.compile(r"\b(" + "|".join(f"(?:{word})" for word in WORDS) + r")\b", re.IGNORECASE)
_ALLOWED = re.compile(r"\b(" + "|".join(ALLOWED) + r")\b", re.IGNORECASE)
_COMMENT = re.compile(r"(?:^|\s)#(.*)")
_STRINGS = {tokenize.STRING, tokenize.FSTRING_MIDDLE, tokenize.COMMENT}


def tracked(*patterns: str) -> list[str]:
    """Paths of the files that git knows, relative to the repository."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(path for path in done.stdout.split("\n") if path and (ROOT / path).exists())


def prose(path: str, text: str) -> list[tuple[int, str]]:
    """Lines of prose with their numbers: all of Markdown, comments and strings of Python, comments of the rest."""
    lines = list(enumerate(text.splitlines(), 1))
    if path.endswith(".md"):
        return lines
    if path.endswith(".py"):
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in _STRINGS]
        return [(t.start[0] + n, line) for t in tokens for n, line in enumerate(t.string.splitlines())]
    return [(number, found[1]) for number, line in lines if (found := _COMMENT.search(line))]


def odd_words(path: str, text: str) -> list[str]:
    """One text per finding: file, line, the word and what to write instead."""
    found = []
    for number, line in prose(path, text):
        checked = _ALLOWED.sub("", line)
        for match in _PATTERN.finditer(checked):
            instead = next(say for word, say in WORDS.items() if re.fullmatch(word, match[0], re.IGNORECASE))
            found.append(f"{path}:{number}: {match[0]!r}: write {instead}")
    return found


CODE = [
    *("crds", "Makefile", "hack", "operator/*.py", "trainer/*.py", "charts/dpo_monitoring/*.py"),
    *("charts/dpo-operator/templates", "charts/dpo-operator/values.yaml", "tests/*.py", "tests/*.yaml"),
]
"""Code whose comments and strings are checked too."""

UNCHECKED = {"tests/docs/test_prose.py"}
"""This file holds the words themselves."""

PAGES = [page for page in tracked("*.md", "examples", *CODE) if page not in GENERATED | UNCHECKED]


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_plain(page: str) -> None:
    assert odd_words(page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_an_odd_word_is_found_with_its_line() -> None:
    assert odd_words("a.md", "Fine.\nStarted anew.") == ["a.md:2: 'anew': write again"]
    assert odd_words("a.md", "TP stands for tensor parallel. A retold story.") == []
    code = 'told = 1  # it is told so\n"""\nWhoever."""\nprint(f"{told} mends")\n'
    assert [line.split(":")[1] for line in odd_words("a.py", code)] == ["1", "3", "4"]
    assert odd_words("a.yaml", "told: 1\nkey: 2 # told\n") == ["a.yaml:2: 'told': write says, reports, distinguished"]
