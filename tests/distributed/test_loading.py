"""A model is read once by all ranks together, the same under the same key in every layout, and so it is written."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_api.models import read_config
from dpo_store import open_store
from dpo_testing.faults import FaultProxy, fault_proxy
from dpo_testing.gloo import run_ranks
from dpo_testing.loading_ranks import LARGEST_FILE, Cases, Layout, load, place
from dpo_testing.models import reference_model, save_folder, single_process
from dpo_testing.s3server import S3Server, need, s3_server
from dpo_trainer.formats.delivery import readers
from dpo_trainer.formats.huggingface import load_weights
from dpo_trainer.model.build import build_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("loading")]

LAYOUTS: dict[int, list[Layout]] = {2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2), (2, 1), (4, 1)]}
"""Processes → layouts."""

AFTER = (2, 13, 24)
"""Requests before the one that is refused: the header takes two, then come tensors of the one rank or the other."""

REFUSED = [(case, after) for after in AFTER for case in range(len(LAYOUTS[2]))]
SELECTED = [(0, AFTER[0]), (1, AFTER[1]), (2, AFTER[2])]
"""Of these, what `make test` runs; the others are nightly, in a run of their own."""

MISSING = "model.layers.1.mlp.up_proj.weight"

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "head_dim": 6}
"""Over 4 ranks the 2 key/value groups are cut across. 4 does not divide the vocabulary of 131, nor 2 the 3 layers."""


@pytest.fixture(scope="module")
def folders(world: Path) -> list[Path]:
    """Biases and several files; a tied embedding."""
    several = save_folder(reference_model("qwen2", **SHAPE), world / "several", max_shard_size="60KB")
    assert len(list(several.glob("*.safetensors"))) > 2
    return [several, save_folder(reference_model("qwen3", **SHAPE), world / "tied")]


@pytest.fixture(scope="module")
def keys(folders: list[Path]) -> dict[str, str]:
    """The fingerprint of each model when one process loads it."""
    store = open_store()
    with single_process():
        return {
            folder.name: load_weights(build_model(read_config(store, str(folder))), store, str(folder)).fingerprint
            for folder in folders
        }


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(folder: Path, exported: Path) -> None:
    expected, got = weights(folder), weights(exported)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value.view(torch.uint8), got[name].view(torch.uint8)), name


def assert_read_once(folder: Path, ranges: list[tuple[str, int, int]]) -> None:
    """Together the ranges are each byte of each file, once."""
    assert {Path(uri).name for uri, _, _ in ranges} == {file.name for file in folder.glob("*.safetensors")}
    for file in folder.glob("*.safetensors"):
        at = 0
        for start, end in sorted((start, end) for uri, start, end in ranges if Path(uri).name == file.name):
            assert start == at, f"{file.name}: byte {min(start, at)} was read {'twice' if start < at else 'never'}"
            at = end
        assert at == file.stat().st_size


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as running:
        running.make_bucket("models")
        yield running


@pytest.fixture(scope="module")
def s3(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(folders: list[Path], s3: FaultProxy, server: S3Server, world: Path) -> Callable[..., Path]:
    """Processes → the folder in which they have left what they loaded."""

    @functools.cache
    def of(processes: int, *, nightly: bool = False) -> Path:
        """nightly: only the refusals that `make test` leaves out."""
        out = world / f"loaded by {processes}{' nightly' * nightly}"
        out.mkdir()
        refused: list[tuple[Layout, str]] = []
        others: list[tuple[Layout, str]] = []
        if processes == 2:
            chosen = [case for case in REFUSED if (case in SELECTED) != nightly]
            refused = [(LAYOUTS[2][case], f"s3://models/refused-{after}-{case}") for case, after in chosen]
        if processes == 2 and not nightly:
            others = [(layout, f"s3://models/fine-{i}") for i, layout in enumerate(LAYOUTS[2])]
            others.append(((2, 1), str(damaged(folders[1], world / "damaged"))))
        cases = Cases(
            folders,
            folders[1],
            [] if nightly else LAYOUTS[processes],
            [*others, *refused],
            server.environment(endpoint=s3.endpoint),
        )
        for _, uri in cases.addresses:
            if uri.startswith("s3:"):
                for file in folders[1].iterdir():
                    server.client().upload_file(str(file), "models", f"{uri.rpartition('/')[2]}/{file.name}")
        for _, uri in refused:
            name, after = uri.rpartition("/")[2], int(uri.split("-")[1])
            s3.add("status", path=rf"{name}/model\.safetensors", code=403, reason="AccessDenied", skip=after)
        run_ranks(processes, load, cases, out)
        return out

    return of


def damaged(folder: Path, copy: Path) -> Path:
    """A copy that lacks one tensor."""
    shutil.copytree(folder, copy)
    held = load_file(copy / "model.safetensors")
    del held[MISSING]
    save_file(held, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_every_byte_is_read_once_and_arrives(
    processes: int, folders: list[Path], keys: dict[str, str], loaded: Callable[..., Path]
) -> None:
    for layout in LAYOUTS[processes]:
        for folder in folders:
            out = place(loaded(processes), layout, folder.name)
            reports = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]
            assert {report["fingerprint"] for report in reports} == {keys[folder.name]}, out.name
            assert_read_once(folder, [tuple(found) for report in reports for found in report["ranges"]])
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            assert {report["bytes"] for report in reports} == {size}
            assert all(len(report["ranges"]) > 5 for report in reports), "a rank took no part in the reading"
            assert_same(folder, out / "exported")
            assert_written_once(out / "exported", [report["written"] for report in reports])
            assert_data_ranks_equal(out, layout, processes)
            if folder.name == "tied" and layout[1] > 1:
                parts = [load_file(out / f"copy-{rank}.safetensors")["copy"] for rank in range(layout[0])]
                embedding = weights(folder)["model.embed_tokens.weight"]
                assert torch.equal(torch.cat(parts)[: len(embedding)], embedding)
                assert not torch.cat(parts)[len(embedding) :].any()


def assert_written_once(out: Path, written: list[list[str]]) -> None:
    """Each file by one rank, about as many by each rank, and none larger than it may be, but for a larger tensor."""
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert sorted(name for names in written for name in names) == files
    assert min(len(names) for names in written) >= 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        held = load_file(out / file)
        assert sum(value.nbytes for value in held.values()) <= LARGEST_FILE or len(held) == 1


def assert_data_ranks_equal(out: Path, layout: Layout, processes: int) -> None:
    tensor, pipeline = layout
    data = processes // (tensor * pipeline)
    for stage in range(pipeline):
        for rank in range(tensor):
            held = [
                load_file(out / f"rank-{stage * data * tensor + copy * tensor + rank}.safetensors")
                for copy in range(data)
            ]
            for other in held[1:]:
                assert other.keys() == held[0].keys()
                assert all(torch.equal(value, other[name]) for name, value in held[0].items())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_the_exact_values_of_a_rounded_model_are_read_once_too(
    processes: int, folders: list[Path], loaded: Callable[..., Path]
) -> None:
    for layout in LAYOUTS[processes]:
        out = place(loaded(processes), layout, "again")
        reports = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        read = sum(end - start for report in reports for _, start, end in report["ranges"])
        assert read == sum(value.nbytes for value in weights(folders[1]).values())
        assert_same(folders[1], out / "exported")


@pytest.mark.parametrize("case", range(len(LAYOUTS[2])))
def test_from_s3_every_byte_is_sent_once(
    case: int, folders: list[Path], s3: FaultProxy, loaded: Callable[..., Path]
) -> None:
    place(loaded(2), LAYOUTS[2][case], f"fine-{case}")
    ranges = []
    for seen in s3.seen:
        if seen.method == "GET" and f"fine-{case}/model.safetensors" in seen.path and seen.range:
            first, last = seen.range.removeprefix("bytes=").split("-")
            ranges.append((seen.path.partition("?")[0], int(first), int(last) + 1))
    assert_read_once(folders[1], ranges)


@pytest.mark.parametrize("case", range(len(LAYOUTS[2])))
def test_to_s3_every_tensor_is_written(
    case: int, folders: list[Path], server: S3Server, loaded: Callable[..., Path], tmp_path: Path
) -> None:
    loaded(2)
    found = server.client().list_objects_v2(Bucket="models", Prefix=f"fine-{case}-exported/")["Contents"]
    for entry in found:
        server.client().download_file("models", entry["Key"], str(tmp_path / Path(entry["Key"]).name))
    assert_same(folders[1], tmp_path)


@pytest.mark.parametrize("case", range(len(LAYOUTS[2])))
def test_a_full_disk_of_one_rank_is_every_ranks_error(case: int, loaded: Callable[..., Path]) -> None:
    out = place(loaded(2), LAYOUTS[2][case], f"fine-{case}")
    found = errors(out)
    assert found[0] is not None
    assert found[0] == found[1]
    assert found[0][0] == "NoSpaceError"
    assert found[0][1].startswith(f"{out}/full/model-")
    assert not (out / "full" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("case", "after"), [pytest.param(*c, marks=[] if c in SELECTED else pytest.mark.nightly) for c in REFUSED]
)
def test_a_refusal_of_one_rank_is_every_ranks_error(case: int, after: int, loaded: Callable[..., Path]) -> None:
    left = loaded(2) if (case, after) in SELECTED else loaded(2, nightly=True)
    found = errors(place(left, LAYOUTS[2][case], f"refused-{after}-{case}"))
    assert found[0] is not None
    assert found[0] == found[1]
    assert found[0][0] == "AccessDeniedError"
    assert found[0][1].startswith(f"s3://models/refused-{after}-{case}/model.safetensors: ")


def test_a_missing_tensor_is_every_ranks_error(loaded: Callable[..., Path]) -> None:
    found = errors(place(loaded(2), (2, 1), "damaged"))
    assert found[0] is not None
    assert found[0] == found[1]
    assert found[0][0] == "InvalidModelError"
    assert f"tensor {MISSING} is missing" in found[0][1]


def errors(out: Path) -> list[list[str] | None]:
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_the_reading_is_dealt_by_size() -> None:
    assert readers([100, 10, 10, 80, 10], 2) == [0, 1, 1, 1, 0]
    assert readers([5, 5, 5, 5], 4) == [0, 1, 2, 3]
    assert readers([7, 7], 1) == [0, 0]
