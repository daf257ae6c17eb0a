"""Checks a checkpoint's pickle before torch loads it.

torch's distributed checkpoints keep their table of contents in `.metadata`, a pickle that torch reads without
restrictions. A crafted file could run code. So it is first read by an unpickler that allows only the classes that a
valid file needs. If this succeeds, the file refers to no other class and torch can load it safely.
"""

from pathlib import Path

from dpo_api.errors import IncompatibleCheckpointError
from dpo_api.pickles import CHECKPOINT, AllowListUnpickler


class _Reader(AllowListUnpickler):
    allowed = CHECKPOINT


def check_metadata(path: Path, uri: str) -> None:
    """Raise IncompatibleCheckpointError unless the file is a checkpoint's table of contents only."""
    try:
        with path.open("rb") as file:
            _Reader(file).load()
    except FileNotFoundError:
        raise IncompatibleCheckpointError(
            f"{uri} holds no .metadata: it is not a checkpoint of this software"
        ) from None
    except Exception as error:
        raise IncompatibleCheckpointError(f"{uri}/.metadata is damaged or unsafe to load: {error}") from error
