"""Reading a large object from S3: the trainer's stream against boto3's own body of the same object.

    python benchmarks/s3_stream.py [--gib 10]

A real S3 server (versitygw) serves a sparse file on this machine, so no disk limits either. Each form reads the object
in a process of its own, twice in turn; the faster one counts. The memory by which a process grows is its peak less what
it had after a first small object. boto3's body is read in blocks of 1 MiB, without retries. The last line is JSON.
"""

# ruff: noqa: E402 - the packages are found from here
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "trainer", "tests/support")]

from peers.memory import status

from dpo_store import open_store

MIB = 2**20


def read(form: str, key: str) -> int:
    """Read s3://bench/KEY in this process; return its bytes."""
    if form == "ours":
        return sum(map(len, open_store().stream(f"s3://bench/{key}")))
    import boto3

    body = boto3.client("s3").get_object(Bucket="bench", Key=key)["Body"]
    return sum(map(len, body.iter_chunks(MIB)))


def measure(form: str) -> dict[str, float]:
    """Read the small object, then the large one; its bytes, seconds, CPU, and the growth of the peak in bytes."""
    read(form, "small")
    before, began, cpu = status("VmHWM"), time.perf_counter(), time.process_time()
    size = read(form, "large")
    return {
        "bytes": size, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu,
        "grown": status("VmHWM") - before,
    }  # fmt: skip


def main() -> None:
    """Print a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0)
    parser.add_argument("--child", choices=("ours", "boto3"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    from dpo_testing.s3server import s3_server

    best: dict[str, dict[str, float]] = {}
    with s3_server() as server:
        server.make_bucket("bench")
        (server.folder / "bench" / "small").write_bytes(bytes(MIB))
        with (server.folder / "bench" / "large").open("wb") as file:
            file.truncate(int(options.gib * 2**30))
        for _ in range(2):
            for form in ("boto3", "ours"):
                done = subprocess.run(
                    [sys.executable, __file__, f"--child={form}"],
                    env={**os.environ, **server.environment()}, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                found = json.loads(done.stdout)
                assert found["bytes"] == int(options.gib * 2**30), found
                if form not in best or found["seconds"] < best[form]["seconds"]:
                    best[form] = found
    print("| | MiB/s | seconds of CPU per GiB | memory grew by |\n|---|---|---|---|")
    for form, found in best.items():
        size = found["bytes"] / MIB
        print(
            f"| {form} | {size / found['seconds']:,.0f} | {1024 * found['cpu'] / size:.2f} |"
            f" {found['grown'] / MIB:.1f} MiB |"
        )
    ratio = best["boto3"]["seconds"] / best["ours"]["seconds"]
    print(f"ours / boto3: {ratio:.2f} × the rate")
    print(json.dumps({**best, "ratio": ratio}))


if __name__ == "__main__":
    main()
