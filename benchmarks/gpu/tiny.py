"""The quickstart's little world: a tokenizer, an untrained Llama of two layers, and preferences."""

import importlib.util
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write_world(folder: Path, small: bool) -> None:
    """Write untrained/ and preferences/."""
    made: Any = importlib.util.spec_from_file_location("world", EXAMPLES / "quickstart" / "world.py")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    module.make_world(folder, **({"treaties": 24, "held_out": 4} if small else {}))
