"""The index pass: every row validated and tokenised once, the usable pairs on disk, their number known before
training.

Rows are streamed and encoded in batches, so memory is O(buffer); the result is kept in the node's cache under a key of
everything that changes it. One process of a node builds it while the others wait, and a complete index is reused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_api import errors
from dpo_api.blend import uses_per_epoch
from dpo_api.errors import DPOError, InvalidModelError, InvalidSpecError, Outcome
from dpo_api.inputs import DataFormat, data_format
from dpo_api.spec import Data, DataSource, DPOJobSpec
from dpo_api.texts import counted, size
from dpo_store import ObjectInfo, Store
from dpo_store.cache import cache_folder, exclusive, free_bytes, no_space
from dpo_trainer.data.index.spill import FORMAT, PairIndex, SpillWriter
from dpo_trainer.data.index.tally import Tally
from dpo_trainer.data.packs.order import Blend
from dpo_trainer.data.problems import Problem
from dpo_trainer.data.reading.ranked import names_read, records_of
from dpo_trainer.data.reading.records import Record
from dpo_trainer.data.reading.rows import place, read_rows
from dpo_trainer.data.tokens.encode import EncodedPair, PairEncoder
from dpo_trainer.data.tokens.tokenizer import Tokenizer

_BATCH_LINES = 256
_BATCH_BYTES = 1 << 20  # with a list of ids, 30 to 60 times this while a batch is encoded
_FIRST_SPACE_CHECK = 1024  # lines; before that the ratio of text to tokens is too rough to refuse a run on
_COMPRESSION = 4  # text is about this many times its .gz or .zst: for the announcement only


@dataclass(frozen=True)
class Source:
    """Data at one address and the store that reaches it."""

    name: str
    uri: str
    store: Store
    format: DataFormat | None = None
    """Of all its files; None: as their names say."""

    def files(self) -> list[ObjectInfo]:
        """The objects that the address stands for, in reading order."""
        return self.store.expand(self.uri)


@dataclass(frozen=True)
class _File:
    """One object to read. ``number``: the position of its source."""

    number: int
    source: Source
    info: ObjectInfo
    format: DataFormat

    def place(self, row: int) -> str:
        """Name a row in messages."""
        return place(self.info.uri, self.format, row)


@dataclass(frozen=True)
class IndexProgress:
    """How far the pass over one data set is."""

    name: str
    lines: int
    pairs: int
    tokens: int


@dataclass(frozen=True)
class Listener:
    """Receives reports: ``message`` gets sentences for people, ``progress`` a report after each batch."""

    message: Callable[[str], None] = lambda _: None
    progress: Callable[[IndexProgress], None] = lambda _: None


@dataclass(frozen=True)
class DataIndexes:
    """All the data of a job: one index over every training source, one for each validation source by its name."""

    train: PairIndex
    validation: dict[str, PairIndex]


def build_indexes(
    spec: DPOJobSpec,
    tokenizer: Tokenizer,
    store_of: Callable[[DataSource], Store],
    *,
    vocabulary: int | None = None,
    cache: Path | None = None,
    listener: Listener | None = None,
) -> DataIndexes:
    """Build or reuse the indexes of a spec's data; ``store_of`` opens the store of a source (its own access settings).

    See ``build_index`` for the other arguments and the errors.
    """
    rejected_needed = spec.dpo.has_preference
    if vocabulary is not None:
        for doubt in tokenizer.check_vocabulary(vocabulary):
            (listener or Listener()).message(f"warning: {doubt}")

    def build(name: str, sources: Sequence[Source]) -> PairIndex:
        return build_index(
            name,
            sources,
            tokenizer,
            spec.data,
            rejected_needed=rejected_needed,
            vocabulary=vocabulary,
            cache=cache,
            listener=listener,
        )

    def named(kind: str, sources: Sequence[DataSource]) -> list[Source]:
        return [
            Source(source.name or f"{kind}-{number}", source.uri, store_of(source), source.format)
            for number, source in enumerate(sources)
        ]

    train = build("train", named("train", spec.data.train))
    held_out = named("validation", spec.data.validation)
    if len({source.name for source in held_out}) < len(held_out):
        raise InvalidSpecError("spec.data.validation: a source is named like another's position; name every source")
    return DataIndexes(train, {source.name: build(source.name, [source]) for source in held_out})


def blend_of(data: Data, index: PairIndex) -> Blend:
    """Return how often an epoch uses each source's pairs. Raises InvalidSpecError if it uses none of a source."""
    pairs = tuple(int(source["pairs"]) for source in index.stats["sources"])
    return Blend(pairs, uses_per_epoch(pairs, [source.weight for source in data.train]))


def build_index(
    name: str,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    data: Data,
    *,
    rejected_needed: bool = True,
    vocabulary: int | None = None,
    cache: Path | None = None,
    listener: Listener | None = None,
) -> PairIndex:
    """Index the sources, concatenated in this order, or reuse the complete index of the same content and settings.

    ``name`` is used in messages. ``rejected_needed=False`` is SFT alone: rejected responses are neither asked for nor
    kept. ``vocabulary`` is the model's; ``cache`` defaults to ``cache_folder()``. Every process of a node may call
    this at once.

    Raises InvalidDataError (lines that cannot be used, listed as file:line; no usable pair), InvalidModelError (a
    token id outside the model's vocabulary), NoSpaceError, and whatever the store raises (NotFoundError,
    AccessDeniedError, …).
    """
    tell = listener or Listener()
    files = [
        _File(number, source, info, data_format(info.uri, source.format))
        for number, source in enumerate(sources)
        for info in source.files()
    ]
    key = _key(sources, files, tokenizer, data, rejected_needed)
    folder = (cache or cache_folder()) / "index" / key
    index = PairIndex.open(folder)
    if index is None:
        failure = folder.with_suffix(".failed.json")
        before = _stamp(failure)
        with exclusive(folder.with_suffix(".lock")):
            index = PairIndex.open(folder)
            if index is None:
                _raise_if_new(failure, before)
                try:
                    index = _Pass(name, sources, files, tokenizer, data, rejected_needed, tell).write(folder)
                except DPOError as error:
                    _note(failure, error)
                    raise
                failure.unlink(missing_ok=True)
    else:
        tell.message(f"index of {name}: reused {folder}")
    _check_vocabulary(index, vocabulary)
    return index


def _key(
    sources: Sequence[Source],
    files: Sequence[_File],
    tokenizer: Tokenizer,
    data: Data,
    rejected_needed: bool,
) -> str:
    settings = data.model_dump(mode="json", exclude={"train", "validation"})
    content = {
        "format": FORMAT,
        "sources": [[source.name, source.uri] for source in sources],
        "files": [[each.number, each.info.uri, each.info.size, each.info.etag, each.format] for each in files],
        "tokenizer": tokenizer.fingerprint,
        "settings": settings,
        "rejected": rejected_needed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _check_vocabulary(index: PairIndex, vocabulary: int | None) -> None:
    largest = int(index.stats["largestId"])
    if vocabulary is not None and largest >= vocabulary:
        raise InvalidModelError(
            f"{index.stats['largestIdAt']}: token id {largest} is outside the model's vocabulary of {vocabulary} ids;"
            " the tokenizer and the model do not match, or tokens were added to only one of them"
        )


# -- one process fails for all: those that waited for it do not read the data again only to fail alike


def _stamp(note: Path) -> int | None:
    try:
        return note.stat().st_mtime_ns
    except OSError:
        return None


def _note(note: Path, error: DPOError) -> None:
    if error.outcome.retry != "permanent":
        return
    try:
        note.write_text(json.dumps({"outcome": error.outcome.value, "message": str(error)}), encoding="utf-8")
    except OSError:
        return  # a full disk: the others find out for themselves


def _raise_if_new(note: Path, before: int | None) -> None:
    if _stamp(note) in (None, before):
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        error = Outcome[found["outcome"]].error
        message = str(found["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise error(message)


class _Pass:
    """One pass over the data of one index."""

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        files: Sequence[_File],
        tokenizer: Tokenizer,
        data: Data,
        rejected_needed: bool,
        listener: Listener,
    ) -> None:
        self._name = name
        self._files = files
        self._data = data
        self._rejected_needed = rejected_needed
        self._listener = listener
        self._encoder = PairEncoder(tokenizer, data)
        variables = tokenizer.chat.reads if tokenizer.chat is not None else frozenset()
        self._names = names_read(data.columns, rejected_needed=rejected_needed) | variables
        self._tally = Tally(name, data, [(source.name, source.uri) for source in sources])
        # Whether no record shows that it met a template: rendered here, special tokens in its text, or the same end
        # of all prompts, such as "\nAssistant:".
        self._bare = tokenizer.chat is not None
        self._prompt_ends: set[tuple[int, ...]] = set()  # of two tokens; no more than two of them are kept
        self._dated = tokenizer.chat is not None and tokenizer.chat.uses_date
        self._rendered = False  # whether any record needed the template
        self._read = 0  # bytes of text
        self._largest = (-1, "")
        self._next_space_check = 1  # lines

    def write(self, folder: Path) -> PairIndex:
        writer = SpillWriter(folder)
        try:
            for batch in self._batches():
                self._encode(batch, writer)
                self._watch_space(folder, writer)
                total = self._tally.total
                self._listener.progress(IndexProgress(self._name, total.lines, total.pairs, total.tokens))
            self._tally.check()
            stats = self._tally.stats(
                [(each.info.uri, each.format) for each in self._files],
                template_date=self._dated and self._rendered,
                bare=self._bare and len(self._prompt_ends) > 1,
            )
            writer.finish({**stats, "largestId": self._largest[0], "largestIdAt": self._largest[1]})
        except BaseException:
            writer.abandon()
            raise
        index = PairIndex.open(folder)
        if index is None:
            raise errors.InternalError(f"{folder}: the index that was just written is incomplete")
        return index

    def _batches(self) -> Iterator[list[tuple[int, int, Record | Problem]]]:
        """Records as (number of the file, row, record or problem), enough of them to keep the tokenizer busy."""
        batch: list[tuple[int, int, Record | Problem]] = []
        held = 0
        for number, file in enumerate(self._files):
            for row in read_rows(file.source.store, file.info, file.format, self._names):
                self._read += row.size
                self._tally.read(file.number)
                found: Sequence[Record] | Problem = (
                    row.content
                    if isinstance(row.content, Problem)
                    else records_of(row.content, self._data, rejected_needed=self._rejected_needed)
                )
                for item in [found] if isinstance(found, Problem) else found:
                    batch.append((number, row.number, item))
                    held += row.size
                    if len(batch) >= _BATCH_LINES or held >= _BATCH_BYTES:
                        yield batch
                        batch, held = [], 0
        if batch:
            yield batch

    def _encode(self, batch: Sequence[tuple[int, int, Record | Problem]], writer: SpillWriter) -> None:
        encoded = iter(self._encoder.encode([item for _, _, item in batch if isinstance(item, Record)]))
        for number, line, item in batch:
            file = self._files[number]
            result = next(encoded) if isinstance(item, Record) else item
            self._rendered = self._rendered or (isinstance(item, Record) and not isinstance(item.prompt, str))
            if isinstance(result, Problem):
                self._tally.drop(file.number, file.place(line), result)
                continue
            self._bare = self._bare and not (self._rendered or self._encoder.has_special(result))
            if len(self._prompt_ends) < 2:
                self._prompt_ends.add(tuple(result.prompt[-2:].tolist()))
            self._tally.keep(file.number, result, ended=result.truncated or self._encoder.ends(result.chosen))
            self._note_largest(result, file.place(line))
            if not self._tally.failed:  # once it has failed, the rest is read only to say how many lines are bad
                writer.add(result, number, line)

    def _note_largest(self, pair: EncodedPair, where: str) -> None:
        largest = max(int(np.max(part, initial=-1)) for part in (pair.prompt, pair.chosen, pair.rejected))
        if largest > self._largest[0]:
            self._largest = (largest, where)

    def _watch_space(self, folder: Path, writer: SpillWriter) -> None:
        """Announce the size after the first batch; then stop early when the rest cannot fit."""
        lines = self._tally.total.lines
        if lines < self._next_space_check or not writer.written:
            return
        ratio = writer.size / self._read
        stored = sum(each.info.size for each in self._files)
        free = free_bytes(folder)
        if self._next_space_check == 1:
            text = sum(each.info.size * (_COMPRESSION if _compressed(each) else 1) for each in self._files)
            self._listener.message(
                f"index of {self._name}: {counted(len(self._files), 'object')}, {size(stored)};"
                f" about {size(round(ratio * max(text, self._read)))} of token ids in {folder}"
                f" ({size(free)} free)"
            )
        self._next_space_check = max(2 * lines, _FIRST_SPACE_CHECK)
        # A lower bound: compressed text is at least its stored size. Tables may hold columns that are not read.
        lower = sum(each.info.size for each in self._files if each.format == "jsonl")
        rest = round(ratio * max(lower - self._read, 0))
        if lines >= _FIRST_SPACE_CHECK and rest > free:
            raise no_space(folder, f"the token index of the {self._name} data", writer.size + rest, free)


def _compressed(file: _File) -> bool:
    return file.format != "jsonl" or file.info.uri.endswith((".gz", ".zst"))
