"""TensorBoard and Weights & Biases, read back by their own readers, and the rule that sinks stop nothing."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_api.errors import AccessDeniedError, PortInUseError
from dpo_api.manifest import DPOJob, parse_job
from dpo_store import Store, open_store
from dpo_trainer.metrics.hub import Hub, shown_settings
from dpo_trainer.metrics.tensorboard import TensorBoardWriter
from dpo_trainer.metrics.writer import Background, Guarded, Writers, run_id


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_scalars_and_a_resume(tmp_path: Path) -> None:
    first = TensorBoardWriter(str(tmp_path), open_store(), None)
    for step in range(1, 6):
        first.write(step, {"train/loss": float(step), "train/acc": 0.5})
    first.write(5, {"val/acc": 0.25})
    first.close()
    assert scalars(tmp_path) == {
        "train/loss": [(step, float(step)) for step in range(1, 6)],
        "train/acc": [(step, 0.5) for step in range(1, 6)],
        "val/acc": [(5, 0.25)],
    }
    time.sleep(1.1)  # event files are distinguished and ordered by the second in their names
    second = TensorBoardWriter(str(tmp_path), open_store(), 3)
    second.write(4, {"train/loss": 40.0})
    second.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


class RecordingStore(Store):
    """A local store whose addresses count as remote: it keeps what is written."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def write(self, uri: str, data: bytes) -> None:
        self.objects[uri] = data


def test_tensorboard_files_are_copied_to_an_object_store(tmp_path: Path) -> None:
    store = RecordingStore()
    writer = TensorBoardWriter("s3://runs/a/tensorboard", store, None, interval=0.01)
    writer.write(1, {"train/loss": 0.5})
    writer.flush()
    assert len(store.objects) == 1
    writer.write(2, {"train/loss": 0.25})
    writer.close()
    ((uri, data),) = store.objects.items()
    assert uri.startswith("s3://runs/a/tensorboard/events.out.tfevents.")
    (tmp_path / "events.out.tfevents.1").write_bytes(data)
    assert scalars(tmp_path) == {"train/loss": [(1, 0.5), (2, 0.25)]}


# -- Weights & Biases


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The history of the one offline run below a folder, read from its record file (a LevelDB log of messages)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for payload in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({"step": record.history.step.num} | row)
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    block, position, parts = 32768, 7, b""  # after the file's own header
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or last of several
            yield parts
            parts = b""


def job(**logging_section: Any) -> DPOJob:
    return parse_job(
        {
            "apiVersion": "dpo-operator.dev/v1alpha1",
            "kind": "DPOJob",
            "metadata": {"name": "demo"},
            "spec": {
                "model": {"huggingFace": {"uri": "/models/a"}},
                "data": {"train": [{"uri": "/data/a.jsonl"}]},
                "logging": logging_section,
            },
        }
    )


OFFLINE = """
import sys
from pathlib import Path
from dpo_api.spec import Wandb
from dpo_trainer.metrics.wandb import WandbWriter
settings = Wandb(project="p", name=None, mode="offline", tags=("a", "b"))
writer = WandbWriter(settings, job="demo", run_dir=sys.argv[1], folder=Path(sys.argv[1]), config={"dpo": {"beta": 0.1}})
writer.write(1, {"train/loss": 0.5, "train/acc": 0.75})
writer.write(2, {"train/loss": 0.25})
writer.write(2, {"val/acc": 0.625})
writer.close()
"""


@pytest.mark.slow
def test_wandb_offline_needs_no_network_and_no_key(tmp_path: Path) -> None:
    """In a process of its own, as in a run, with a proxy that refuses every connection."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "https_proxy": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    history = wandb_history(tmp_path)
    assert [(row["step"], {k: v for k, v in row.items() if k.startswith(("train", "val"))}) for row in history] == [
        (1, {"train/loss": 0.5, "train/acc": 0.75}),
        (2, {"train/loss": 0.25, "val/acc": 0.625}),
    ]


def test_wandb_online_without_a_key_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(AccessDeniedError, match=r"spec.logging.wandb: no API key; set \$WANDB_API_KEY"):
        Hub(job(wandb={"project": "p"}))
    (tmp_path / "netrc").write_text("machine other.example login a password b\n", encoding="utf-8")
    with pytest.raises(AccessDeniedError):
        Hub(job(wandb={"project": "p"}))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n", encoding="utf-8")
    Hub(job(wandb={"project": "p"})).close()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    Hub(job(wandb={"project": "p", "baseURL": "https://wandb.example"})).close()


def test_a_services_settings_hold_no_pod_environment() -> None:
    document = json.loads(job(wandb={"project": "p"}).to_json())
    document["spec"]["podTemplate"] = {"env": [{"name": "HF_TOKEN", "value": "hf_secret"}]}
    shown = shown_settings(parse_job(document))
    assert "hf_secret" not in json.dumps(shown)
    assert shown["logging"] == {"wandb": {"project": "p"}}


def test_attempts_of_a_run_directory_share_an_id() -> None:
    assert run_id("s3://runs/a/") == run_id("s3://runs/a")
    assert run_id("s3://runs/a") != run_id("s3://runs/b")


# -- sinks that fail


class Broken:
    """A sink that fails each time."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, _step: int, _metrics: Mapping[str, float]) -> None:
        self.calls += 1
        raise RuntimeError("the service\nsays no")

    def flush(self) -> None:
        raise RuntimeError("no flush")

    def close(self) -> None:
        raise RuntimeError("no close")


class Kept(Broken):
    """A sink that works."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.closed = False

    def write(self, step: int, _metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_broken_sink_is_one_warning_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, kept = Broken(), Kept()
    writers = Writers([Guarded("TensorBoard", broken), kept])
    for step in range(3):
        writers.write(step, {"train/loss": 1.0})
    writers.flush()
    writers.close()
    assert kept.steps == [0, 1, 2]
    assert kept.closed
    assert broken.calls == 3, "a sink that failed is tried again"
    assert [entry.getMessage() for entry in caplog.records] == [
        "TensorBoard does not accept metrics (RuntimeError: the service); training continues without it"
    ]


def test_closing_reaches_every_sink(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    Writers([Broken(), kept]).close()
    assert kept.closed
    assert len(caplog.records) == 1


def test_background_work_never_makes_the_caller_wait() -> None:
    release, runs = threading.Event(), []

    def slow() -> None:
        runs.append(threading.current_thread().name)
        release.wait(30)

    work = Background("slow", slow, interval=0)
    work.request()
    deadline = time.monotonic() + 30
    while not runs and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(100):
        work.request()
    assert len(runs) == 1, "requests made meanwhile wait for one later run"
    release.set()
    work.finish()
    assert 2 <= len(runs) <= 3
    assert runs[0] == "slow"
    assert runs[-1] == threading.current_thread().name


class LateToClear(threading.Event):
    """An event whose ``clear`` waits for the test, when a thread of ours calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.go = threading.Event(), threading.Event()

    def clear(self) -> None:
        if threading.current_thread().name == "late":
            self.there.set()
            self.go.wait(30)
        super().clear()


def test_background_work_ends_whenever_it_is_told_to() -> None:
    """A request directly before the end: the thread has been woken, and not yet taken note of it."""
    work = Background("late", lambda: None, interval=0)
    first, wanted = work._wanted, LateToClear()
    work._wanted = wanted
    first.set()  # the thread waited on this one; from now on it uses the other
    work.request()
    assert wanted.there.wait(30)
    ending = threading.Thread(target=work.finish, daemon=True)
    ending.start()
    while not work._stopped.is_set():
        time.sleep(0.005)
    wanted.set()  # as `finish` is about to
    wanted.go.set()
    ending.join(30)
    assert not ending.is_alive()


# -- all of it together


def test_hub_opens_what_the_spec_asks_for(tmp_path: Path) -> None:
    run_dir, events = tmp_path / "run", tmp_path / "events"
    hub = Hub(job(tensorboard={"enabled": True}), port=0, host="127.0.0.1", events=events)
    hub.begin(2)
    with pytest.raises(PortInUseError):
        Hub(job(), port=hub.port, host="127.0.0.1")
    hub.open_sinks(open_store(), str(run_dir), attempt=2, resume_step=None)
    hub.write(1, {"train/loss": 0.5})
    hub.flush()
    hub.progress.phase("done")
    hub.close()
    hub.close()
    assert (run_dir / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "train/loss": 0.5}\n'
    assert scalars(run_dir / "tensorboard") == {"train/loss": [(1, 0.5)]}
    assert '"attempt": 2' in events.read_text(encoding="utf-8")
    info = [family for family in hub.prometheus.collect() if family.name == "dpo_trainer_info"]
    assert [set(sample.labels) for family in info for sample in family.samples] == [{"version", "dpojob"}]


def test_hub_without_server_or_sinks(tmp_path: Path) -> None:
    hub = Hub(job())
    assert hub.port is None
    hub.write(0, {"val/acc": 0.5})
    hub.close()
    assert list(tmp_path.iterdir()) == []
