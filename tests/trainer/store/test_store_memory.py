"""The memory bound of the documentation, measured in a process of its own on an object of more than 2 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from dpo_testing.s3server import S3Server

REPOSITORY = Path(__file__).resolve().parents[3]
MIB = 1 << 20
MARKS = 2100
"""The object is as many lines of 1 MiB: 2.2 GB."""

CHILD = """
import itertools, json, sys, time
from pathlib import Path
from dpo_store import open_store
from dpo_store.lines import lines

def high_water():
    # Not ru_maxrss: a child inherits its parent's. This is the process's own since its start.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

ahead, small, big = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = open_store()
# Libraries, client, threads and connections, before the measurement.
for _ in store.stream(small, ahead=1): pass
before = high_water()
count = size = 0
info = store.stat(big)
blocks = store.stream(info, ahead)
first = next(blocks)
# So much is really read ahead: else the bound says nothing.
deadline = time.monotonic() + 60
while ahead < info.size and high_water() - before < 0.9 * ahead:
    assert time.monotonic() < deadline, high_water() - before
    time.sleep(0.01)
for number, line in lines(itertools.chain([first], blocks), big):
    assert line.startswith(b"%08d" % number), (number, line[:20])
    count, size = number, size + len(line) + 1
    if count == int(sys.argv[4]): break
print(json.dumps({"count": count, "size": size, "grown": high_water() - before}))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_formula(server: S3Server, credentials: None, bucket: str) -> None:
    # A file with a mark at the start of each MiB, and nothing but holes between: 8 MB on the disk.
    big = server.folder / bucket / "big.jsonl"
    with big.open("wb") as file:
        for n in range(MARKS):
            file.seek(n * MIB)
            file.write(b"%08d" % (n + 1))
            file.seek((n + 1) * MIB - 1)
            file.write(b"\n")
    assert big.stat().st_size > 2e9
    (server.folder / bucket / "small").write_bytes(bytes(MIB))
    for ahead, marks in [(16 * MIB, MARKS), (64 * MIB, MARKS // 4)]:
        grown = grown_by_reading(server, bucket, "big.jsonl", ahead, marks)
        # What waits for the caller; two blocks, one in pieces; a line in pieces and whole; what the allocator keeps.
        bound = ahead + 3 * MIB + 3 * MIB + 8 * MIB
        print(f"{ahead // MIB} MiB ahead: grew by {grown / MIB:.1f} of {bound / MIB} MiB")
        assert grown <= bound


@pytest.mark.slow
def test_memory_does_not_depend_on_what_a_small_file_expands_to(
    server: S3Server, credentials: None, bucket: str
) -> None:
    # Half a gigabyte in some ten kB of zstd.
    with (server.folder / bucket / "big.jsonl.zst").open("wb") as file:
        writer = zstandard.ZstdCompressor(level=1).stream_writer(file)
        for n in range(MARKS // 4):
            writer.write((b"%08d" % (n + 1)).ljust(MIB - 1, b"x") + b"\n")
        writer.close()
    assert (server.folder / bucket / "big.jsonl.zst").stat().st_size < MIB
    (server.folder / bucket / "small").write_bytes(bytes(MIB))
    grown = grown_by_reading(server, bucket, "big.jsonl.zst", 8 * MIB, MARKS // 4)
    # lines.py: the window; the output of 256 bytes, in pieces and joined; a line likewise; what the allocator keeps.
    assert grown <= 8 * MIB + 2 * 8 * MIB + 3 * MIB + 8 * MIB


def grown_by_reading(server: S3Server, bucket: str, name: str, ahead: int, marks: int) -> int:
    """Return the bytes by which a process grows that reads an object's lines."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            str(ahead),
            f"s3://{bucket}/small",
            f"s3://{bucket}/{name}",
            str(marks),
        ],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{REPOSITORY}/crds:{REPOSITORY}/trainer",
            **server.environment(),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["count"], found["size"]) == (marks, marks * MIB)
    grown: int = found["grown"]
    return grown
