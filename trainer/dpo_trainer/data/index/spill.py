"""The index on disk: token ids and one row per pair, written once, then memory-mapped.

A folder ``index/<key>/`` holds

- ``tokens.i32``: for each pair its prompt, chosen and rejected ids, one after the other, little-endian int32;
- ``pairs.bin``: one ROW per pair;
- ``index.json``: the completion marker, written last: the sizes of both files, the fingerprints and the statistics.

Writing and reading need O(buffer) memory for any number of pairs: the reader maps the files.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_api.errors import DPOError
from dpo_store.cache import free_bytes, no_space
from dpo_store.errors import from_os_error
from dpo_trainer.data.packs.packing import pair_cost
from dpo_trainer.data.reading.rows import place
from dpo_trainer.data.tokens.encode import EncodedPair
from dpo_trainer.data.tokens.tokenizer import Ids

FORMAT = 3
"""Part of every key: increase it if the format of these files or the meaning of a setting changes."""

ROW = np.dtype(
    [
        ("offset", "<i8"),  # of the prompt's first id in tokens.i32, counted in ids
        ("prompt", "<i4"),
        ("chosen", "<i4"),
        ("rejected", "<i4"),
        ("file", "<i4"),  # position in stats["files"]
        ("line", "<i8"),  # or row, from 1
        ("chosen_reward", "<f8"),  # NaN: not in the line
        ("rejected_reward", "<f8"),
    ]
)

_TOKENS, _PAIRS, _MARKER = "tokens.i32", "pairs.bin", "index.json"
_BUFFER = 1 << 20


class SpillWriter:
    """Writes one index folder. A crash leaves no marker, and the next writer starts over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._tokens = (folder / _TOKENS).open("wb", buffering=_BUFFER)
            self._pairs = (folder / _PAIRS).open("wb", buffering=_BUFFER)
        except OSError as error:
            raise from_os_error(error, str(folder)) from error
        self._content = hashlib.sha256(b"dpo-operator pairs 1")
        self._rewards = hashlib.sha256(b"dpo-operator rewards 1")
        self.written = 0
        """Token ids written so far."""

    @property
    def size(self) -> int:
        """Bytes of both files so far."""
        return 4 * self.written + self._pairs.tell()

    def add(self, pair: EncodedPair, file: int, line: int) -> None:
        """Append a pair read from line ``line`` of ``stats["files"][file]``."""
        parts = (pair.prompt, pair.chosen, pair.rejected)
        lengths = tuple(len(part) for part in parts)
        row = np.array((self.written, *lengths, file, line, pair.chosen_reward, pair.rejected_reward), dtype=ROW)
        ids = np.concatenate(parts).astype("<i4", copy=False).tobytes()
        self._content.update(np.array(lengths, dtype="<i4").tobytes())
        self._content.update(ids)
        self._rewards.update(row["chosen_reward"].tobytes() + row["rejected_reward"].tobytes())
        try:
            self._tokens.write(ids)
            self._pairs.write(row.tobytes())
        except OSError as error:
            raise self._explain(error) from error
        self.written += sum(lengths)

    def finish(self, stats: dict[str, Any]) -> None:
        """Sync the files to disk, then write the marker, which makes the index complete."""
        try:
            sizes = {}
            for name, file in ((_TOKENS, self._tokens), (_PAIRS, self._pairs)):
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.tell()
                file.close()
            marker = {
                "format": FORMAT,
                "sizes": sizes,
                "fingerprint": self._content.hexdigest(),
                "rewardsFingerprint": self._rewards.hexdigest(),
                "stats": stats,
            }
            partial = self._folder / f"{_MARKER}.partial"
            with partial.open("w", encoding="utf-8") as out:
                json.dump(marker, out, allow_nan=False)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(self._folder / _MARKER)
        except OSError as error:
            raise self._explain(error) from error

    def abandon(self) -> None:
        """Remove the incomplete index."""
        for file in (self._tokens, self._pairs):
            try:
                file.close()
            except OSError:
                continue  # a full disk refuses the last buffer as well
        shutil.rmtree(self._folder, ignore_errors=True)

    def _explain(self, error: OSError) -> DPOError | OSError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return no_space(self._folder, "the token index", self.size, free_bytes(self._folder))
        return error


class PairIndex:
    """The usable pairs of one data set as token ids, in file order. Read-only, memory-mapped.

    n: number of pairs, at least 1. fingerprint: sha256 over every pair's token ids and bounds; rewards_fingerprint:
    over their rewards in the data. stats: see ``tally.Tally.stats``. folder: the folder of its files.
    """

    def __init__(self, folder: Path, marker: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = marker["fingerprint"]
        self.rewards_fingerprint: str = marker["rewardsFingerprint"]
        self.stats: dict[str, Any] = marker["stats"]
        self._tokens: NDArray[np.int32] = np.memmap(folder / _TOKENS, dtype="<i4", mode="r")
        rows: NDArray[Any] = np.memmap(folder / _PAIRS, dtype=ROW, mode="r")
        self._rows = rows
        self._bounds = rows.view("<i4").reshape(len(rows), -1)[:, 2:5]  # [n, 3]: prompt, chosen, rejected
        self.n = len(rows)

    @classmethod
    def open(cls, folder: Path) -> "PairIndex | None":
        """Return the index in this folder, or None if there is no complete one."""
        try:
            marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
            whole = all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
        except (OSError, ValueError, KeyError):
            return None
        return cls(folder, marker) if whole and marker.get("format") == FORMAT else None

    def __len__(self) -> int:
        return self.n

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[n, 3] int32: tokens of prompt, chosen and rejected (0 if rejected is not needed)."""
        return self._bounds

    def tokens(self, pair: int) -> tuple[Ids, Ids, Ids]:
        """Return the token ids of the pair's prompt, chosen and rejected text: read-only views of the file."""
        start = int(self._rows["offset"][pair])
        prompt, chosen, rejected = (int(size) for size in self._bounds[pair])
        middle, last = start + prompt, start + prompt + chosen
        return self._tokens[start:middle], self._tokens[middle:last], self._tokens[last : last + rejected]

    def rewards(
        self, pairs: Sequence[int] | NDArray[np.int64], default_chosen: float, default_rejected: float
    ) -> NDArray[np.float32]:
        """Return [k, 2] float32: rewards of chosen and rejected, or the defaults if a line has none."""
        rows = self._rows[np.asarray(pairs, dtype=np.int64)]
        given = np.stack([rows["chosen_reward"], rows["rejected_reward"]], axis=1)  # [k, 2]
        filled = np.where(np.isnan(given), np.array([default_chosen, default_rejected]), given)
        return filled.astype(np.float32)

    def costs(self, pairs: Sequence[int] | NDArray[np.int64], *, share: bool, with_rejected: bool = True) -> list[int]:
        """Return [k] tokens that each pair takes in a pack's stream (see ``packing.pair_cost``)."""
        return [
            pair_cost(int(prompt), int(chosen), int(rejected) if with_rejected else 0, share=share)
            for prompt, chosen, rejected in self._bounds[np.asarray(pairs, dtype=np.int64)]
        ]

    def origin(self, pair: int) -> str:
        """Return the ``file:line`` of the pair; in a table, ``file:row N``."""
        row = self._rows[pair]
        file = int(row["file"])
        return place(self.stats["files"][file], self.stats["formats"][file], int(row["line"]))
