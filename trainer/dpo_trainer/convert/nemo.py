"""A model as a .nemo archive of NeMo 1.x, with the layout of Megatron-Core inside.

The files are first written into a folder beside the archive, and then put together; so a stopped conversion continues.
"""

import tarfile
from collections.abc import Iterator

from dpo_api.models.megatron.outgoing import nemo_settings, shape_of
from dpo_api.models.megatron.settings import CONFIG
from dpo_store import ObjectInfo, Store, join_uri
from dpo_trainer.convert import megatron
from dpo_trainer.convert.journal import NAME, Journal
from dpo_trainer.convert.nemo_tokenizer import settings_of
from dpo_trainer.convert.progress import Progress
from dpo_trainer.convert.whole import Whole

WEIGHTS = "model_weights"
PARTS = ".parts"
"""What the folder of the parts has behind the archive's name."""


def write(source: Whole, store: Store, uri: str, journal: Journal, progress: Progress) -> None:
    """Write the archive, which appears when it is complete. Its parts are deleted then."""
    parts = uri + PARTS
    tokenizer, files = settings_of(source)
    settings = nemo_settings(shape_of(source.config, source.uri), tokenizer, source.uri)
    megatron.write_weights(source, store, join_uri(parts, WEIGHTS), journal, progress, prefix="model.")
    for name, data in {CONFIG: settings, **files}.items():
        store.write(join_uri(parts, name), data)
    members = [info for info in store.list(parts) if not info.uri.endswith(f"/{NAME}")]
    # The settings first: a reader of a compressed copy then finds them soon.
    members.sort(key=lambda info: (not info.uri.endswith(f"/{CONFIG}"), info.uri))
    base = members[0].uri.removesuffix(CONFIG)
    store.write_blocks(uri, _tar(store, members, base), _size(members))
    store.delete_tree(parts)


_BLOCK = 512


def _size(members: list[ObjectInfo]) -> int:
    return sum(_BLOCK + -(-info.size // _BLOCK) * _BLOCK for info in members) + 2 * _BLOCK


def _tar(store: Store, members: list[ObjectInfo], base: str) -> Iterator[bytes]:
    for info in members:
        entry = tarfile.TarInfo("./" + info.uri.removeprefix(base))
        entry.size = info.size
        yield entry.tobuf(tarfile.GNU_FORMAT)
        yield from store.stream(info)
        yield b"\0" * (-info.size % _BLOCK)
    yield b"\0" * (2 * _BLOCK)
