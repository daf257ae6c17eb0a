"""Pushes the exported model to the Hugging Face Hub, and notes in the run directory that it is there.

Only what the export wrote is pushed: files of other names in the same folder stay where they are.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Final

from dpo_api.errors import StorageUnavailableError
from dpo_api.running import OutputHub
from dpo_api.spec import DPOJobSpec
from dpo_store import ObjectInfo, Timing, join_uri
from dpo_store.push import Branch
from dpo_trainer.card import CARD
from dpo_trainer.exporting import ADAPTER, ADAPTER_FILES, WEIGHTS, Place, forms_of
from dpo_trainer.formats.export import OTHER_FILES, TOKENIZER_FILES
from dpo_trainer.rundir import EXPORT, RunDirectory

PUSHED: Final = "pushed.json"
"""The push that is done: its ``server``, ``uri`` (the branch's address) and ``commit``, and the SHA-256 of export.json
as ``export``."""

_WHOLE: Final = frozenset({"config.json", CARD, *TOKENIZER_FILES, *OTHER_FILES})
_ALONE: Final = frozenset({CARD, *ADAPTER_FILES})
_WRONG_AT_TOP: Final = re.compile(WEIGHTS.pattern + "|" + "|".join(map(re.escape, ADAPTER_FILES)))
"""Files that change what a folder with a whole model is to its readers, if an earlier push left them there."""


def prepare(hub: OutputHub, warn: Callable[[str], None], timing: Timing | None = None) -> None:
    """Create the repository and the branch unless they exist, so that a push that cannot work fails before training.

    A hub that cannot be reached now is a warning: there is time until the push. Raises AccessDeniedError for a token
    that is missing, wrong, or may not write to the repository.
    """
    try:
        _branch(hub, timing).create(private=hub.private)
    except StorageUnavailableError as error:
        warn(f"the push at the end could not be checked: {error}")


def pushed_before(directory: RunDirectory, hub: OutputHub) -> str | None:
    """Return the address of the commit that holds the run's present export, if it was pushed to this branch."""
    found = directory.read_json(PUSHED) or {}
    wanted = {"server": _branch(hub).server, "uri": hub.uri, "export": _digest(directory)}
    return _address(hub, str(found["commit"])) if found == {**wanted, "commit": found.get("commit")} else None


def push(
    directory: RunDirectory, spec: DPOJobSpec, place: Place, *, title: str, progress: Callable[[str], None]
) -> str:
    """Push what ``export.json`` marks as complete, and return the address of its commit: ``hf://org/name@<commit>``.

    place: the folder of the model. title: of the commit. progress: called before each file is sent with its path and
    number, as "config.json, 2 of 5".
    """
    hub = spec.output.hub
    assert hub is not None  # noqa: S101 - the caller asks first
    export = _digest(directory)
    files = files_of(spec, place)

    def sending(number: int, path: str) -> None:
        progress(f"{path}, {number} of {len(files)}")

    whole, _ = forms_of(spec)
    branch = _branch(hub)
    branch.create(private=hub.private)  # it may be gone since the start, or the hub was away then
    commit = branch.push(
        files, place[0], title=title, is_stale=_misleads if whole else lambda _: False, progress=sending
    )
    directory.write_json(PUSHED, {"server": branch.server, "uri": hub.uri, "commit": commit, "export": export})
    return _address(hub, commit)


def files_of(spec: DPOJobSpec, place: Place) -> dict[str, ObjectInfo]:
    """Return what is pushed of a model's folder, by the path in the repository, in the paths' order.

    The Hugging Face folder, with adapter/ if the spec asks for one; without a whole model the adapter's own files, so
    that the repository is what PEFT reads.
    """
    store, uri = place
    whole, adapter = forms_of(spec)
    found = {info.uri.removeprefix(join_uri(uri, "")): info for info in store.list(uri)}
    if not whole:
        top = {path.removeprefix(f"{ADAPTER}/"): info for path, info in found.items() if path.startswith(f"{ADAPTER}/")}
        return {path: top[path] for path in sorted(_ALONE & set(top))}
    wanted = _WHOLE | ({f"{ADAPTER}/{name}" for name in _ALONE} if adapter else set())
    return {path: found[path] for path in sorted(found) if path in wanted or WEIGHTS.fullmatch(path)}


def _misleads(path: str) -> bool:
    """Return whether a file that an earlier push left would make readers take something else for the model."""
    return _WRONG_AT_TOP.fullmatch(path.removeprefix(f"{ADAPTER}/")) is not None


def _branch(hub: OutputHub, timing: Timing | None = None) -> Branch:
    return Branch(hub.repository, hub.revision, timing=timing)


def _address(hub: OutputHub, commit: str) -> str:
    return f"hf://{hub.repository}@{commit}"


def _digest(directory: RunDirectory) -> str:
    return hashlib.sha256(directory.store.read(directory.path(EXPORT))).hexdigest()
