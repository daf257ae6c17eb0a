"""The quickstart's world in the cluster's bucket: the base model is trained once and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dpo_testing.realcluster.layout import REPOSITORY, Layout
from dpo_testing.s3server import S3Server

_EXAMPLE = REPOSITORY / "examples" / "quickstart"
_WORLD = "runs/quickstart"
_MAKE_WORLD = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from world import make_world;"


def make(layout: Layout) -> Path:
    """Return the folder that holds ``sft/model`` and ``world/preferences``; train the base model unless it is there."""
    folder = layout.cache / f"world-{_fingerprint()}"
    home = folder / _WORLD
    if not (home / "sft" / "export.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        home.mkdir(parents=True)
        _run(folder, "-c", f"{_MAKE_WORLD} make_world(Path({_WORLD!r}) / 'world')", str(_EXAMPLE))
        _run(folder, "-m", "dpo_cli", "run", "-f", str(_EXAMPLE / "sft.yaml"))
    return home


def upload(home: Path, server: S3Server, bucket: str) -> None:
    """Put base model and preferences into a bucket, at the keys that the quickstart's manifest names."""
    client = server.client()
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    for source, prefix in ((home / "sft" / "model", "base"), (home / "world" / "preferences", "preferences")):
        for path in sorted(source.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(source)}")


def _run(folder: Path, *words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(words[:3])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in ("world.py", "sft.yaml"):
        digest.update((_EXAMPLE / name).read_bytes())
    return digest.hexdigest()[:12]
