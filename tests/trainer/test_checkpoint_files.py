"""Which parts of a checkpoint's files a rank reads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_api.models.megatron.distributed import TABLE
from dpo_trainer.checkpoint import files
from dpo_trainer.checkpoint.boxes import Box
from dpo_trainer.checkpoint.store import FORMAT

MATRIX = torch.arange(48.0).view(8, 6)
VECTOR = torch.arange(100.0, 105.0)


def box(key: str, whole: Tensor, first: int, last: int, values: Tensor | None = None) -> Box:
    """Rows [first, last) of a tensor."""
    held = whole[first:last].clone() if values is None else values
    return Box(key, (first, *(0 for _ in whole.shape[1:])), tuple(whole.shape), held)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two ranks: rows 0 to 4 of a matrix and a vector; rows 5 to 7."""
    own = [[box("master.m", MATRIX, 0, 5), box("master.v", VECTOR, 0, 5)], [box("master.m", MATRIX, 5, 8)]]
    written = [entry for rank, boxes in enumerate(own) for entry in files.write(tmp_path, rank, boxes)]
    (tmp_path / TABLE).write_bytes(files.table(written))
    return tmp_path


@pytest.mark.parametrize(
    ("first", "last", "parts"),
    [
        (0, 5, ["__0_0.distcp"]),
        (5, 8, ["__1_0.distcp"]),
        (6, 8, ["__1_0.distcp"]),
        (4, 6, ["__0_0.distcp", "__1_0.distcp"]),
    ],
)
def test_a_rank_reads_each_part_that_it_needs_once_and_no_other(
    folder: Path, first: int, last: int, parts: list[str]
) -> None:
    half = (first + last) // 2
    wanted = [
        box("master.m", MATRIX, low, high, torch.full((high - low, 6), torch.nan))
        for low, high in ((first, half), (half, last))
    ]
    reading = files.Reading(folder, wanted, FORMAT)
    read: list[tuple[str, int]] = []

    def fetch(name: str, start: int, length: int) -> bytes:
        read.append((name, length))
        return (folder / name).read_bytes()[start : start + length]

    reading.from_ranges(fetch)
    assert [name for name, _ in read] == parts
    assert sum(length for _, length in read) == reading.bytes < reading.bytes_of_all
    assert torch.equal(torch.cat([part.values for part in wanted]), MATRIX[first:last])


def test_all_parts_are_the_files(folder: Path) -> None:
    reading = files.Reading(folder, [], FORMAT)
    assert reading.bytes == 0
    assert reading.bytes_of_all == sum(file.stat().st_size for file in folder.glob("*.distcp"))
