"""Parquet and Arrow sources: the pairs of the same data in JSON lines, and one clear error for what is broken."""

import datetime as dt
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from dpo_api.errors import InvalidDataError
from dpo_api.inputs import DataFormat
from dpo_api.spec import Columns, Data
from dpo_store import ObjectInfo, Store, open_store
from dpo_testing.corpora import Row, byte_bpe_tokenizer, chat_rows, preference_rows, write_jsonl
from dpo_testing.s3server import S3Server, need, s3_server
from dpo_trainer.data.index.build import Source, build_index
from dpo_trainer.data.index.spill import PairIndex
from dpo_trainer.data.reading import tables
from dpo_trainer.data.reading.records import names_read
from dpo_trainer.data.reading.rows import read_rows
from dpo_trainer.data.tokens.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def server() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as running:
        yield running


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
    format: DataFormat | None = None,  # noqa: A002 - the field's name
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


def test_a_table_is_read_from_s3_by_ranges(
    tmp_path: Path, tokenizer: Tokenizer, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    server.make_bucket("tables")
    rows = [{**row, "notes": "x" * 20_000 + str(number)} for number, row in enumerate(preference_rows(400))]
    write_parquet(server.folder / "tables" / "a.parquet", rows, compression="none", use_dictionary=False)
    write_stream(server.folder / "tables" / "b.arrow", rows)
    write_file(server.folder / "tables" / "c.arrow", rows)
    expected = build(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache")
    store = open_store(server.options())
    read: list[int] = []
    whole = store.read

    def counted(source: str | ObjectInfo, start: int = 0, length: int | None = None) -> bytes:
        data = whole(source, start, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(store, "read", counted)
    for name, projected in (("a.parquet", True), ("c.arrow", True), ("b.arrow", False)):
        read.clear()
        index = build(f"s3://tables/{name}", tokenizer, tmp_path / "cache", store=store)
        assert index.fingerprint == expected.fingerprint
        assert not projected or 0 < sum(read) < 2_000_000, "of 8 MB, most of them in a column that is not read"
    index = build("s3://tables/*.arrow", tokenizer, tmp_path / "cache", store=store)
    assert (index.n, index.origin(400)) == (800, "s3://tables/c.arrow:row 1")


def test_a_struct_s_null_field_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All structs of a column have the same fields, so an absent key of a message comes as a null."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a", "name": "x"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]
    schema = pa.Table.from_pylist(rows).schema
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))
    wide = pa.schema([pa.field(name, message) for name in schema.names])
    pq.write_table(pa.Table.from_pylist(rows, schema=wide), tmp_path / "a.parquet")
    (row,) = read_rows(open_store(), open_store().stat(f"{tmp_path}/a.parquet"), "parquet", names_read(Columns()))
    assert row.content == rows[0]


BAD_COLUMNS: dict[str, tuple[pa.Array, str]] = {
    "numbers": (pa.array([1, 2]), '"prompt" is a number, expected a string or a list of messages'),
    "binary": (pa.array([b"a", b"b"]), '"prompt" is binary data, expected a string'),
    "nulls": (pa.array([None, None], pa.string()), 'no "prompt" (keys here: "prompt", "chosen", "rejected")'),
    "null messages": (
        pa.array([[None], [None]], pa.list_(pa.struct([("role", pa.string())]))),
        '"prompt"[0] is not a message with a "role" and a "content"',
    ),
    "null content": (
        pa.array([[{"role": "user", "content": None}]] * 2),
        '"prompt"[0] has null as "content", expected a string',
    ),
    "nested lists": (pa.array([[["a"]], [["b"]]]), '"prompt"[0] is not a message'),
    "maps": (
        pa.array([[("a", "b")]] * 2, pa.map_(pa.string(), pa.string())),
        '"prompt" is an object, expected a string',
    ),
    "times": (pa.array([dt.datetime(2024, 1, 1)] * 2), '"prompt" is datetime, expected a string'),  # noqa: DTZ001
}


@pytest.mark.parametrize("case", list(BAD_COLUMNS))
def test_a_wrong_type_names_the_row_and_the_column(tmp_path: Path, tokenizer: Tokenizer, case: str) -> None:
    column, message = BAD_COLUMNS[case]
    table = pa.table({"prompt": column, "chosen": ["a", "b"], "rejected": ["c", "d"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InvalidDataError) as caught:
        build(tmp_path / "a.parquet", tokenizer, tmp_path / "cache")
    assert f"{tmp_path}/a.parquet:row 1: {message}" in str(caught.value)
    assert f"{tmp_path}/a.parquet:row 2: " in str(caught.value)


def test_a_text_that_is_not_utf_8_is_a_row_s_problem(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = pa.array([b"q", b"\xff", b"r"]).view(pa.string())
    table = pa.table({"prompt": raw, "chosen": ["a\n"] * 3, "rejected": ["c\n"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InvalidDataError, match=r'a.parquet:row 2: "prompt" is not UTF-8 \(byte 1 of a text\)'):
        build(tmp_path / "a.parquet", tokenizer, tmp_path / "cache")
    index = build(tmp_path / "a.parquet", tokenizer, tmp_path / "cache", onInvalid="skip", boundary="separate")
    assert (index.n, index.stats["dropped"]) == (2, {"badText": 1})
    assert index.origin(1) == f"{tmp_path}/a.parquet:row 3"


def test_a_reward_that_is_no_number_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "a.parquet", [{**row, "chosen_reward": float("nan")} for row in preference_rows(1)])
    with pytest.raises(InvalidDataError, match='row 1: "chosen_reward" is nan, not a finite number'):
        build(tmp_path / "a.parquet", tokenizer, tmp_path / "cache")


def damaged(path: Path, how: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(how(path.read_bytes()))
    return path


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = preference_rows(20)

    def refused(path: Path, format: DataFormat | None = None) -> str:  # noqa: A002 - the field's name
        with pytest.raises(InvalidDataError) as caught:
            build(path, tokenizer, tmp_path / "cache", format=format)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    parquet = write_parquet(tmp_path / "a.parquet", rows)
    text = write_jsonl(tmp_path / "a.jsonl", rows)
    assert "is a Parquet file, not JSON lines; set the source's format: parquet" in refused(parquet, "jsonl")
    assert "is an Arrow file, not JSON lines" in refused(write_file(tmp_path / "a.data", rows))
    assert "is not a Parquet file: it begins with b'{\"" in refused(text, "parquet")
    assert "is not an Arrow file or stream" in refused(text, "arrow")
    assert "is not an Arrow file or stream" in refused(parquet, "arrow")
    (tmp_path / "empty.parquet").touch()
    assert "is not a Parquet file" in refused(tmp_path / "empty.parquet")
    assert "damaged Parquet data (Parquet magic bytes not found in footer" in refused(
        damaged(write_parquet(tmp_path / "cut.parquet", rows), lambda data: data[:-5])
    )
    assert "damaged Arrow data" in refused(damaged(write_file(tmp_path / "b.arrow", rows), lambda data: data[:-5]))
    assert "damaged Arrow data" in refused(damaged(write_stream(tmp_path / "c.arrow", rows), lambda data: data[:-600]))
    assert "encrypted" in refused(damaged(parquet, lambda data: b"PARE" + data[4:-4] + b"PARE"))
    named = build(write_parquet(tmp_path / "a.data2", rows), tokenizer, tmp_path / "cache", format="parquet")
    assert named.n == 20


def test_a_row_that_is_too_large_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MAX_ROW", 10_000)
    rows: list[Row] = [*preference_rows(7), {"prompt": "q", "chosen_response": "x" * 20_000, "rejected_response": "y"}]
    with pytest.raises(InvalidDataError, match=r"row group 2: declares 20,\d+ bytes in 1 rows, more than 10,000 bytes"):
        build(write_parquet(tmp_path / "a.parquet", rows), tokenizer, tmp_path / "cache")
    with pytest.raises(InvalidDataError, match=r"a.arrow:row 8: is larger than 10,000 bytes"):
        build(write_file(tmp_path / "a.arrow", rows), tokenizer, tmp_path / "cache")


FUZZ = """
import collections, pathlib, random, resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from dpo_api.errors import InvalidDataError
from dpo_store import open_store
from dpo_api.inputs import data_format
from dpo_trainer.data.reading.rows import read_rows

folder, draw, store, found = pathlib.Path(sys.argv[1]), random.Random(7), open_store(), collections.Counter()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
names = frozenset(["prompt", "chosen", "rejected", "chosen_reward"])
for path in sorted(folder.iterdir()):
    whole = path.read_bytes()
    for _ in range(int(sys.argv[2])):
        data = bytearray(whole)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)):]
        else:
            start = draw.choice([0, max(0, len(data) - 2000)])
            at = start + draw.randrange(min(2000, len(data) - start) - 4)
            new = draw.choice([b"\\xff" * 4, b"\\xff\\xff\\xff\\x7f", b"\\0", draw.randbytes(1)])
            data[at:at + draw.choice([1, 4])] = new
        (folder / f"bad{path.suffix}").write_bytes(data)
        info = store.stat(str(folder / f"bad{path.suffix}"))
        try:
            found[len(list(read_rows(store, info, data_format(info.uri), names)))] += 1
        except InvalidDataError as error:
            assert str(error).startswith(info.uri) and "\\n" not in str(error), error
            found["refused"] += 1
    (folder / f"bad{path.suffix}").unlink()
print(found["refused"])
"""


@pytest.mark.parametrize("rounds", [40, pytest.param(2000, marks=pytest.mark.nightly)])
def test_a_damaged_file_is_one_error_and_never_a_crash(tmp_path: Path, rounds: int) -> None:
    """Bytes are changed, above all where sizes are declared; the process may not take more than 4 GiB."""
    rows = [{**row, "chosen_reward": number / 3, "unused": None} for number, row in enumerate(chat_rows(100))]
    for compression in ("zstd", "snappy", "none"):
        write_parquet(tmp_path / f"{compression}.parquet", rows, compression=compression, row_group_size=40)
    write_file(tmp_path / "a.arrow", rows)
    write_stream(tmp_path / "b.arrow", rows)
    write_feather(tmp_path / "c.feather", rows)
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path), str(rounds)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2 * rounds


GROWTH = """
import sys
from pathlib import Path
from dpo_store import open_store
from dpo_api.inputs import data_format
from dpo_trainer.data.reading.rows import read_rows

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

store, names = open_store(), frozenset(["prompt", "chosen", "rejected"])
for path in sys.argv[1:]:
    before = peak()
    count = sum(1 for _ in read_rows(store, store.stat(path), data_format(path), names))
    print(count, peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of Parquet with one row group, and of an Arrow file: 130 MB take what a fourth of that took."""
    rows = [{**row, "chosen": row["prompt"] * 40, "rejected": "no"} for row in preference_rows(1000)]
    paths = []
    for times in (7, 28):
        table = pa.concat_tables([pa.Table.from_pylist(rows)] * times)
        pq.write_table(table, tmp_path / f"{times}.parquet", row_group_size=1_000_000, use_dictionary=False)
        feather.write_feather(table, str(tmp_path / f"{times}.arrow"), chunksize=1000, compression="uncompressed")
        paths += [str(tmp_path / f"{times}.parquet"), str(tmp_path / f"{times}.arrow")]
    assert table.nbytes > 120e6
    done = subprocess.run([sys.executable, "-c", GROWTH, *paths], check=True, capture_output=True, text=True)
    grown = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [count for count, _ in grown] == [7000, 7000, 28_000, 28_000]
    assert grown[2][1] + grown[3][1] < 20e6


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_table_without_any_known_column_says_what_it_has(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    name, write = WRITERS[kind]
    with pytest.raises(InvalidDataError, match="3 of 3 lines") as caught:
        build(write(tmp_path / name, [{"question": "q", "good": "a"}] * 3), tokenizer, tmp_path / "cache")
    assert f'{name}:row 1: no "chosen_response" or "chosen" (keys here: "question", "good")' in str(caught.value)


def test_a_table_without_rows_is_no_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(InvalidDataError, match=r"a.parquet: no line in the train data"):
        build(tmp_path / "a.parquet", tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["large", "view", "category"],
)
def test_every_kind_of_text_column_is_text(tmp_path: Path, tokenizer: Tokenizer, kind: pa.DataType) -> None:
    """As polars, DuckDB and pandas' categories write them; rewards as integers or of half precision."""
    rows = [
        {**row, "chosen_reward": number % 5, "rejected_reward": 0} for number, row in enumerate(preference_rows(30))
    ]
    table = pa.Table.from_pylist(rows)
    for name, column in (("prompt", kind), ("chosen_reward", pa.int8()), ("rejected_reward", pa.float16())):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(column))
    expected = build(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache")
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.arrow"), chunksize=11)
    for name in ("a.parquet", "a.arrow"):
        index = build(tmp_path / name, tokenizer, tmp_path / "cache")
        assert (index.fingerprint, index.rewards_fingerprint) == (expected.fingerprint, expected.rewards_fingerprint)
