"""What a phase found: figures, and checks that it passed or failed. Written to a file after each of them."""

import json
import math
from pathlib import Path
from typing import Any


class Report:
    """One phase's figures and checks. A phase that is ended from outside leaves what it had found by then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []
        self.checks = 0

    def add(self, **figures: Any) -> None:
        """Add figures, or replace them. Those that are not finite become null: nobody computed them."""
        self.figures |= {name: _finite(value) for name, value in figures.items()}
        self._write()

    def require(self, truth: bool, otherwise: str) -> None:
        """Count a check; ``otherwise`` says what is wrong."""
        self.checks += 1
        if not truth:
            self.failed.append(otherwise)
            print(f"FAILED {otherwise}", flush=True)
        self._write()

    def within(self, what: str, value: float, bound: float) -> None:
        """Check that a value is at most ``bound``, and not NaN."""
        self.require(value <= bound, f"{what} is {value:.3g}, at most {bound:.3g} is right")

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"figures": self.figures, "checks": self.checks, "failed": self.failed}))
        partial.rename(self.path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
