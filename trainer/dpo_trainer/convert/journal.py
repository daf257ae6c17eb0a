"""Which files of a conversion are complete, so that a second run continues where the first one was stopped."""

import json
from typing import Any

from dpo_api.errors import UsageError
from dpo_store import Store, join_uri

NAME = "dpo-convert.json"
"""A file of the target folder while the conversion runs. It is deleted when all is written."""


class Journal:
    """The target folder's record of what is complete."""

    def __init__(self, store: Store, folder: str, identity: dict[str, Any]) -> None:
        """Continue what is in the folder, or begin. identity: of JSON's types, of the source and of what is asked for.

        Raises UsageError if the folder holds anything but a part of the same conversion.
        """
        self._store, self._folder = store, folder
        names = store.children(folder)
        self._done: dict[str, Any] = {}
        if NAME in names:
            found = self._read()
            if found.get("identity") != identity:
                raise UsageError(
                    f"{folder} holds a part of another conversion: {_words(found.get('identity'))}; choose another"
                    " target, or delete that folder"
                )
            self._done = dict(found.get("files") or {})
        elif names:
            raise UsageError(f"{folder} is not empty (it holds {names[0]}); choose another target")
        self._identity = identity
        self._write()

    def done(self, file: str) -> Any:
        """Return what was noted about a file that is complete, else None."""
        return self._done.get(file)

    def add(self, file: str, note: Any) -> None:
        """Note that a file is complete, and what a later run needs to know of it."""
        self._done[file] = note
        self._write()

    def close(self) -> None:
        """All is written."""
        self._store.delete(join_uri(self._folder, NAME))

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._store.read(join_uri(self._folder, NAME)))
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        said = {"identity": self._identity, "files": self._done}
        self._store.write(join_uri(self._folder, NAME), json.dumps(said).encode())


def _words(identity: object) -> str:
    if not isinstance(identity, dict):
        return f"its {NAME} is damaged"
    return f"of {identity.get('source')} to {identity.get('format')}"
