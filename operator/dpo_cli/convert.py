"""`dpo convert`: the trainer's command of the same name, with this terminal."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from dpo_cli.trainer import MODULE, require_trainer


@dataclass(frozen=True)
class ConvertOptions:
    """The command's arguments."""

    source: str
    target: str
    adapter: str | None
    to: str | None
    dtype: str | None
    endpoint: str | None
    region: str | None
    check: bool


def convert(options: ConvertOptions) -> int:
    """Convert a model; return the exit code. Raises NotFoundError where no trainer is installed."""
    require_trainer()
    words = [*MODULE, "convert", options.source, options.target]
    for name in ("adapter", "to", "dtype", "endpoint", "region"):
        value = getattr(options, name)
        if value is not None:
            words.append(f"--{name}={value}")
    if not options.check:
        words.append("--no-check")
    child = subprocess.Popen(words)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child has got it from the terminal too, and says what is left
            continue
