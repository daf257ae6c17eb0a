"""Images, built by BuildKit straight into the cluster's own containerd: nothing is pushed, pulled or imported."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from dpo_testing.realcluster import base, daemons
from dpo_testing.realcluster.layout import (
    BASE_IMAGE,
    BUSYBOX_IMAGE,
    PAUSE_IMAGE,
    REPOSITORY,
    TRAINING_OPERATOR_IMAGE,
    Layout,
)
from dpo_testing.realcluster.node import ctr
from dpo_testing.s3server import module_of, tool

BUILDKITD = """\
root = "{cache}/buildkit"
[grpc]
  address = ["unix://{run}/buildkitd.sock"]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "{run}/containerd.sock"
  namespace = "k8s.io"
  snapshotter = "overlayfs"
  gc = false
  networkMode = "host"
"""

_KEEP_MEGABYTES = 15_000
_ROOM_BYTES = 22_000_000_000


def start_builder(layout: Layout) -> None:
    """Start BuildKit; it is stopped once the images are built."""
    config = layout.etc / "buildkitd.toml"
    config.write_text(BUILDKITD.format(cache=layout.cache, run=layout.run))
    daemons.start(layout, "buildkitd", [tool("buildkitd"), "--config", config])
    daemons.wait_until(layout, "buildkitd", lambda: _buildctl(layout, "debug", "workers").returncode == 0)


def small(layout: Layout) -> None:
    """Build what a node needs besides ours: the pause process, a busybox for init containers, training-operator."""
    folder = layout.cache / "small"
    pause = _folder(folder / "pause")
    if not (pause / "pause").exists():
        source = module_of("k8s.io/kubernetes") / "build" / "pause" / "linux" / "pause.c"
        subprocess.run(["gcc", "-Os", "-static", "-o", str(pause / "pause"), str(source)], check=True)
    _once(layout, PAUSE_IMAGE, pause, 'FROM scratch\nCOPY pause /pause\nUSER 65535:65535\nENTRYPOINT ["/pause"]\n')
    busybox = _folder(folder / "busybox")
    shutil.copy("/bin/busybox", busybox / "busybox")
    install = 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\nUSER 65532\n'
    _once(layout, BUSYBOX_IMAGE, busybox, install)
    operator = _folder(folder / "training-operator")
    shutil.copy(tool("training-operator"), operator / "manager")
    _once(layout, TRAINING_OPERATOR_IMAGE, operator, "FROM scratch\nCOPY manager /manager\nUSER 65532:65532\n")


def python_base(layout: Layout) -> None:
    """Build the base image that replaces a registry's."""
    context = base.build_context(layout)
    if not _built(layout, BASE_IMAGE, base.fingerprint(layout)):
        build(layout, BASE_IMAGE, context)
        _mark(layout, BASE_IMAGE, base.fingerprint(layout))


def product(
    layout: Layout, name: str, image: str, *, context: Path = REPOSITORY, target: str | None = None, **arguments: str
) -> None:
    """Build one of the two Dockerfiles of a tree. BuildKit's cache decides what is rebuilt."""
    arguments = {
        "BASE_IMAGE": BASE_IMAGE,
        "CPU_BASE_IMAGE": BASE_IMAGE,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **arguments,
    }
    build(layout, image, context, dockerfile=f"Dockerfile.{name}", target=target, **arguments)


def build(
    layout: Layout, image: str, context: Path, *, dockerfile: str = "Dockerfile", target: str | None = None,
    **arguments: str,
) -> None:  # fmt: skip
    """Build one image and unpack it, so that the next pod starts at once."""
    words = [
        "build", "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={context}",
        f"--local=dockerfile={context}", f"--opt=filename={dockerfile}", "--opt=image-resolve-mode=local",
        f"--output=type=image,name={image},compression=uncompressed,unpack=true",
    ]  # fmt: skip
    words += [f"--opt=build-arg:{name}={value}" for name, value in arguments.items()]
    words += [f"--opt=target={target}"] if target else []
    done = _buildctl(layout, *words, seconds=1500)
    log = layout.logs / f"build-{image.rpartition('/')[2].replace(':', '-')}.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"building {image} failed (all of it: {log}):\n{(done.stdout + done.stderr)[-3000:]}")


def make_room(layout: Layout, image: str) -> None:
    """Drop an older trainer's image and all build steps where the disk would not hold a second one beside it.

    Only where the layer of dependencies will be another one: a change of code needs no room.
    """
    digest = hashlib.sha256(base.fingerprint(layout).encode())
    for name in ("hack/image/hashes.txt", "pyproject.toml", "hack/image/requirements.py", "Dockerfile.trainer"):
        digest.update((REPOSITORY / name).read_bytes())
    if _built(layout, image, digest.hexdigest()):
        return
    if shutil.disk_usage(layout.cache).free < _ROOM_BYTES:
        _buildctl(layout, "prune", "--all", seconds=300)
        ctr(layout, "images", "rm", "--sync", image)
    free = shutil.disk_usage(layout.cache).free
    if free < _ROOM_BYTES:
        print(f"(only {free / 1e9:.0f} GB free below {layout.cache}; the trainer's image takes 17 to build) ", end="")
    _mark(layout, image, digest.hexdigest())


def prune(layout: Layout) -> None:
    """Forget build steps that no Dockerfile uses any more, the oldest first: one layer of torch is 11 GB of disk."""
    _buildctl(layout, "prune", f"--keep-storage={_KEEP_MEGABYTES}", seconds=300)


def size(layout: Layout, image: str) -> int:
    """Return the bytes of an image's content."""
    for line in ctr(layout, "images", "ls", f"name=={image}").stdout.splitlines()[1:]:
        amount, unit = line.split()[3:5]
        return int(float(amount) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit])
    raise LookupError(image)


def _buildctl(layout: Layout, *words: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    command = [str(tool("buildctl")), "--addr", f"unix://{layout.buildkit_socket}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)


def _once(layout: Layout, image: str, context: Path, dockerfile: str) -> None:
    (context / "Dockerfile").write_text(dockerfile)
    digest = hashlib.sha256()
    for path in sorted(context.iterdir()):
        digest.update(path.read_bytes())
    if not _built(layout, image, digest.hexdigest()):
        build(layout, image, context)
        _mark(layout, image, digest.hexdigest())


def _built(layout: Layout, image: str, fingerprint: str) -> bool:
    mark = _mark_of(layout, image)
    there = image in ctr(layout, "images", "ls", "-q").stdout.split()
    return there and mark.exists() and mark.read_text() == fingerprint


def _mark(layout: Layout, image: str, fingerprint: str) -> None:
    mark = _mark_of(layout, image)
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(fingerprint)


def _mark_of(layout: Layout, image: str) -> Path:
    return layout.cache / "built" / image.rpartition("/")[2].replace(":", "-")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
