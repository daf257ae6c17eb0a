"""Parquet and Arrow sources: the pairs of the same data in JSON lines, and one clear error for what is broken."""

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from dpo_api.spec import Data
from dpo_store import Store, open_store
from dpo_testing.corpora import Row, byte_bpe_tokenizer, chat_rows, preference_rows, write_jsonl
from dpo_trainer.data.index import Source, build_index
from dpo_trainer.data.rows import Format
from dpo_trainer.data.spill import PairIndex
from dpo_trainer.data.tokenizer import Tokenizer, load_tokenizer


def write_parquet(path: Path, rows: Sequence[Row], **how: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **{"row_group_size": 7, **how})
    return path


def write_file(path: Path, rows: Sequence[Row], chunk: int = 7) -> Path:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def write_stream(path: Path, rows: Sequence[Row], chunk: int = 7) -> Path:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def write_feather(path: Path, rows: Sequence[Row]) -> Path:
    feather.write_feather(pa.Table.from_pylist(list(rows)), str(path), chunksize=7, compression="zstd")
    return path


WRITERS: dict[str, tuple[str, Callable[[Path, Sequence[Row]], Path]]] = {
    "parquet": ("a.parquet", write_parquet),
    "arrow file": ("a.arrow", write_file),
    "arrow stream": ("data-00000-of-00001.arrow", write_stream),
    "feather": ("a.feather", write_feather),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def build(
    path: Path | str,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    store: Store | None = None,
    format: Format | None = None,  # noqa: A002 - the field's name
    **settings: Any,
) -> PairIndex:
    data = Data.model_validate({"train": [{"uri": str(path)}], **settings})
    source = Source("train-0", str(path), store or open_store(), format)
    return build_index("train", [source], tokenizer, data, cache=cache)


def conversations(count: int) -> list[Row]:
    """Rows as Hugging Face data sets keep them: lists of structs, with a column that is not read."""
    return [
        {**row, "prompt_id": f"id-{number}", "when": dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "score": number / 7}
        for number, row in enumerate(chat_rows(count))
    ]


@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("rows", ["strings", "messages"])
def test_the_pairs_are_those_of_the_same_data_in_json_lines(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, rows: str
) -> None:
    data = preference_rows(600) if rows == "strings" else conversations(300)
    data = [{**row, "chosen_reward": number / 3} for number, row in enumerate(data)]
    name, write = WRITERS[kind]
    lines = [{key: value for key, value in row.items() if key != "when"} for row in data]
    expected = build(write_jsonl(tmp_path / "a.jsonl", lines), tokenizer, tmp_path / "cache")
    index = build(write(tmp_path / name, data), tokenizer, tmp_path / "cache")
    assert (index.n, index.fingerprint) == (len(data), expected.fingerprint)
    assert index.rewards_fingerprint == expected.rewards_fingerprint
    assert index.origin(11) == f"{tmp_path}/{name}:row 12"
    assert expected.origin(11) == f"{tmp_path}/a.jsonl:12"
