"""The operator under many jobs: latency, CPU, memory, and what a restart costs.

    python benchmarks/operator_scale.py [--jobs 1000 --rate 20 --idle 60 --finished 10000]

A real etcd, kube-apiserver and kube-controller-manager serve it. training-operator and the kubelets are played: each
PyTorchJob gets one running pod, and each pod an address of its own at which GET /status is answered, at the shipped
interval. The goals: p99 from create to child under 5 s, idle under 5 % of a core, under 200 MiB.

Two further parts follow. More jobs arrive while two processes keep the machine busy. And an operator starts where 1,000
jobs of 8 pods run and 10,000 are over; these are copies of two real ones, written to etcd directly, so that they are
there within minutes. Its goal is 400 MiB. The API server needs 8 GiB for them. The last line is JSON.
"""

# ruff: noqa: E402 - the test support lies where only pytest finds it by itself
import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kopf
import urllib3
from aiohttp import web

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / package) for package in ("crds", "operator", "tests/support")]

from dpo_api.errors import Outcome
from dpo_api.status import DPOJobStatus
from dpo_operator import patches
from dpo_operator.config import Settings
from dpo_operator.runtime.client import Client
from dpo_operator.runtime.options import Options
from dpo_operator.runtime.resources import CHILDREN, JOBS, PODS
from dpo_operator.runtime.scraper import pace
from dpo_testing.controlplane import ControlPlane, pytorchjob_crd
from dpo_testing.fakekubelet import PORT, last_words, now
from dpo_testing.faketrainer import fence_of
from dpo_testing.jobs import manifest
from dpo_testing.multiplied import Template, write
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.simcluster import SimCluster
from dpo_testing.simcluster import manifest as simulated

NAMESPACE, GROWN = "scale", "grown"
GOALS = {
    "create_to_child_p99_s": 5.0, "idle_cores": 0.05, "memory_mib": 200.0, "grown_memory_mib": 400.0,
    "grown_peak_mib": 512.0, "loaded_create_to_child_p99_s": 5.0,
}  # fmt: skip
GROWN_NODES = 8
ATTEMPTS: dict[str, int] = {}
"""By address: the number that its trainer answers with."""
INDEXES = itertools.count(1000)
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process; ``VmHWM``: its peak."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field}")


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def loopback(index: int) -> str:
    """An address of 127/8 for each number."""
    return f"127.{64 + index // 62500}.{index // 250 % 250}.{index % 250 + 1}"


class Figures(dict[str, float]):
    """Figures by name, each printed when it is known: a part that takes too long costs only its own."""

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        print(f"{name:36} {value:10.3f}", file=sys.stderr, flush=True)


class World:
    """The cluster's other half: notes when children come, and lets their pods run."""

    def __init__(self, plane: ControlPlane, client: Client) -> None:
        self.plane, self.client = plane, client
        self.seen: dict[str, float] = {}
        self._stop = threading.Event()
        self._pending: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Follow PyTorchJobs; run in a thread."""
        path = f"{self.plane.url}{CHILDREN.path(NAMESPACE)}?watch=true&timeoutSeconds=3000"
        while not self._stop.is_set():
            # Right after its definition a kind's storage may not be ready; then, and at a watch's end: again.
            for line in self._lines(path):
                if self._stop.is_set():
                    return
                event = json.loads(line)
                child = event.get("object")
                if event.get("type") == "ADDED" and child["metadata"]["name"] not in self.seen:
                    self.seen[child["metadata"]["name"]] = time.monotonic()
                    loop.call_soon_threadsafe(self._pending.put_nowait, child)
            self._stop.wait(0.5)

    def _lines(self, path: str) -> Iterator[bytes]:
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # at the end, the server goes first
            yield from self.plane.admin.stream(path)

    def stop(self) -> None:
        self._stop.set()

    async def play(self) -> None:
        """Give each new child one running pod, eight at a time."""

        async def one() -> None:
            while True:
                child = await self._pending.get()
                await self._run(child)

        await asyncio.gather(*(one() for _ in range(8)))

    async def _run(self, child: dict[str, Any]) -> None:
        name, index = child["metadata"]["name"], next(INDEXES)
        replicas = child["spec"]["pytorchReplicaSpecs"]
        roles = [("master", 0)] + [("worker", n) for n in range(replicas.get("Worker", {}).get("replicas", 0))]
        template = replicas["Master"]["template"]
        owner = {
            "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": name, "uid": child["metadata"]["uid"],
            "controller": True,
        }  # fmt: skip
        for role, number in roles:
            labels = {
                **template["metadata"]["labels"], "training.kubeflow.org/job-name": name,
                "training.kubeflow.org/replica-type": role, "training.kubeflow.org/replica-index": str(number),
                "training.kubeflow.org/job-role": "master",
                "training.kubeflow.org/operator-name": "pytorchjob-controller",
            }  # fmt: skip
            pod = f"{name}-{role}-{number}"
            spec = {**template["spec"], "nodeName": f"node-{(index + number) % 100}"}
            metadata = {"name": pod, "labels": labels, "ownerReferences": [owner]}
            await self.client.request("POST", PODS.path(NAMESPACE), {"metadata": metadata, "spec": spec})
            container = {
                "name": "pytorch", "image": "i", "imageID": "i", "ready": True, "restartCount": 0,
                "state": {"running": {"startedAt": now()}},
            }  # fmt: skip
            address = loopback(index if role == "master" else 900_000)
            ATTEMPTS[address] = fence_of({"spec": spec})
            status = {"phase": "Running", "podIP": address, "startTime": now(), "containerStatuses": [container]}
            await self.client.patch_status(PODS, NAMESPACE, pod, {"status": status})
        running = {"type": "Running", "status": "True", "reason": "JobRunning", "message": "",
                   "lastTransitionTime": now(), "lastUpdateTime": now()}  # fmt: skip
        started = {"replicaStatuses": {"Master": {"active": 1}}, "startTime": now()}
        await self.client.patch_status(CHILDREN, NAMESPACE, name, {"status": {"conditions": [running], **started}})


async def trainers() -> web.AppRunner:
    """Answer GET /status at every loopback address."""
    start = time.time()

    async def status(request: web.Request) -> web.Response:
        assert request.transport is not None
        attempt = ATTEMPTS.get(request.transport.get_extra_info("sockname")[0], 1)
        done = int(time.time() - start)
        metrics = {"train/loss": 0.5, "train/acc": 0.7, "train/rewards_margin": 0.4}
        said = {"phase": "train", "step": done, "total": 100_000, "epoch": 0.1, "etaSeconds": 1e4, "metrics": metrics,
                "observedAt": time.time(), "attempt": attempt}  # fmt: skip
        return web.json_response(said)

    application = web.Application()
    application.router.add_get("/status", status)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", PORT).start()  # noqa: S104 - all of 127/8, which a test machine keeps inside
    return runner


async def until(look: Callable[[], Any], seconds: float = 600.0) -> float:
    """Wait until ``look`` is true (it may be a coroutine function); return the seconds that it took."""
    begin = time.monotonic()
    while True:
        seen = look()
        if asyncio.iscoroutine(seen):
            seen = await seen
        if seen:
            return time.monotonic() - begin
        if time.monotonic() - begin > seconds:
            raise TimeoutError("the benchmark waited in vain")
        await asyncio.sleep(0.05)


async def versions(client: Client) -> dict[str, str]:
    """resourceVersion of each DPOJob."""
    found = {}
    async for page in client.pages(JOBS, NAMESPACE):
        found.update({item["metadata"]["name"]: item["metadata"]["resourceVersion"] for item in page})
    return found


class Writes:
    """Counts what is written to DPOJobs from now on: mere progress apart from everything else."""

    def __init__(self, plane: ControlPlane) -> None:
        self.progress = self.others = 0
        self.ended = False
        """Whether it counts no more, so that what it has counted is too little."""
        self.enough = False
        """Set when the figures are taken: what follows is not counted."""
        listed = plane.admin.call("GET", JOBS.path(NAMESPACE))
        self._known = {job["metadata"]["name"]: self._of(job) for job in listed["items"]}
        self._url = f"{plane.url}{JOBS.path(NAMESPACE)}?watch=true&timeoutSeconds=3000&resourceVersion="
        self._url += listed["metadata"]["resourceVersion"]
        self._plane = plane
        threading.Thread(target=self._follow, daemon=True).start()

    @staticmethod
    def _of(job: dict[str, Any]) -> dict[str, Any]:
        return patches.without_progress(DPOJobStatus.model_validate(job.get("status") or {}))

    def _follow(self) -> None:
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # at the end, the server goes first
            try:
                for line in self._plane.admin.stream(self._url):
                    event = json.loads(line)
                    if self.enough:
                        return
                    if event["type"] != "MODIFIED":
                        raise RuntimeError(line.decode())
                    name, status = event["object"]["metadata"]["name"], self._of(event["object"])
                    self.progress += status == self._known[name]
                    self.others += status != self._known[name]
                    self._known[name] = status
            finally:
                self.ended = True


async def arrive(client: Client, world: World, jobs: int, rate: float, prefix: str = "job") -> list[float]:
    """Create jobs at a steady rate; return the seconds from each create's answer to its child."""
    made: dict[str, float] = {}
    there = len(world.seen)

    async def create(name: str) -> None:
        await client.request("POST", JOBS.path(NAMESPACE), manifest(name))
        made[name] = time.monotonic()

    begin, tasks = time.monotonic(), []
    for index in range(jobs):
        await asyncio.sleep(max(0.0, begin + index / rate - time.monotonic()))
        tasks.append(asyncio.create_task(create(f"{prefix}-{index:04}")))
    await asyncio.gather(*tasks)
    await until(lambda: len(world.seen) >= there + jobs)
    return [max(0.0, world.seen[f"{name}-1"] - moment) for name, moment in made.items()]


async def finish(client: Client, names: list[str]) -> list[float]:
    """End jobs one by one; return the seconds from the pod's end to the DPOJob's."""
    waits = []
    words = last_words("Succeeded", step=9, total=9, modelUri="s3://runs/m/", runDir="s3://runs/j/")
    for name in names:
        terminated = {"exitCode": 0, "reason": "Completed", "finishedAt": now(), "startedAt": now(),
                      "message": words}  # fmt: skip
        container = {"name": "pytorch", "image": "i", "imageID": "i", "ready": False, "restartCount": 0,
                     "state": {"terminated": terminated}}  # fmt: skip
        done = {"type": "Succeeded", "status": "True", "reason": "JobSucceeded", "message": "",
                "lastTransitionTime": now(), "lastUpdateTime": now()}  # fmt: skip
        status = {"phase": "Succeeded", "containerStatuses": [container]}
        await client.patch_status(PODS, NAMESPACE, f"{name}-1-master-0", {"status": status})
        begin = time.monotonic()
        child = {"status": {"conditions": [done], "completionTime": now()}}
        await client.patch_status(CHILDREN, NAMESPACE, f"{name}-1", child)

        async def over(name: str = name) -> bool:
            job = await client.get(JOBS, NAMESPACE, name)
            return bool((job.get("status") or {}).get("completionTime"))

        await until(over)
        waits.append(time.monotonic() - begin)
    return waits


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep this many processes computing."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def status_bytes(nodes: int = 64, attempts: int = 130) -> int:
    """Bytes of the status of a job whose attempts fail with long messages, from the operator's decisions alone."""
    spec = {"resources": {"nodes": nodes, "gpusPerNode": 8, "memory": "1Gi"}}
    cluster = SimCluster(simulated(**spec, runPolicy={"maxRestarts": 1000, "attemptsHistoryLimit": 0}))
    cluster.run_to("Running")
    for attempt in range(1, attempts + 1):
        for index, name in enumerate(cluster.pods):
            cluster.pods[name]["spec"]["nodeName"] = f"gke-prod-us-central1-a3-megagpu-8g-pool-01-4f2b9c-a{index:03}"
            cluster.end_pod(
                name, Outcome.Communication, message="lost contact with another process. " * 30, step=attempt
            )
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        cluster.sleep_out()
        cluster.run_to("Running")
    return len(json.dumps(cluster.status, separators=(",", ":")))


async def template_of(client: Client, name: str) -> Template:
    """A job of the cluster with all that belongs to it."""
    job = await client.get(JOBS, NAMESPACE, name)
    objects = [job, await client.get(CHILDREN, NAMESPACE, f"{name}-1")]
    async for page in client.pages(PODS, NAMESPACE, selector=f"dpo-operator.dev/job={name}"):
        objects += [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in page]
    return Template(name, objects)


async def grow(
    options: argparse.Namespace,
    plane: ControlPlane,
    client: Client,
    world: World,
    first: OperatorProcess,
    operator: OperatorProcess,
) -> dict[str, float]:
    """Multiply a running and a finished job of 8 pods; return the figures of an operator that finds them.

    ``first``: the operator that runs; it is ended. ``operator``: one of the copies' namespace, which is started.
    """
    names = ("livetemplate", "donetemplate")
    seen = len(world.seen)
    for name in names:
        await client.request("POST", JOBS.path(NAMESPACE), manifest(name, nodes=GROWN_NODES))
    await until(lambda: len(world.seen) >= seen + len(names))

    async def all_run() -> bool:
        found = [await client.get(JOBS, NAMESPACE, name) for name in names]
        return all((job.get("status") or {}).get("state") == "Running" for job in found)

    await until(all_run)
    await finish(client, ["donetemplate"])
    await asyncio.sleep(10.0)
    first.kill()
    world.stop()
    plane.admin.create(("v1", "namespaces"), None, {"metadata": {"name": GROWN}})
    plane.end("kube-controller-manager")  # the garbage collector needs more memory than all that is measured
    live, done = [await template_of(client, name) for name in names]
    address = (await client.request("GET", PODS.path(NAMESPACE, "livetemplate-1-master-0")))["status"]["podIP"]

    def copies() -> Iterator[tuple[str, str, str]]:
        moved = {f'"namespace":"{NAMESPACE}"': f'"namespace":"{GROWN}"'}
        for index in range(options.jobs):
            ATTEMPTS[loopback(100_000 + index)] = ATTEMPTS[address]
            own = {f'"{address}"': f'"{loopback(100_000 + index)}"'}
            yield from live.copy(f"live-{index:05}", index + 1, moved | own)
        for index in range(options.finished):
            yield from done.copy(f"done-{index:05}", index + 1, moved)

    await asyncio.to_thread(write, plane.etcd_port, GROWN, copies())
    results = Figures()
    begin = time.monotonic()
    operator.start()
    await until(lambda: operator.get("/readyz")[0] == 200, 900.0)
    results["grown_ready_s"] = time.monotonic() - begin
    await until(lambda: operator.metric("dpo_operator_queue_depth") == 0, 900.0)
    await asyncio.sleep(options.idle)
    for state in ("Running", "Succeeded"):
        results[f"grown_{state.lower()}"] = operator.metric(f'dpo_operator_jobs{{namespace="{GROWN}",state="{state}"}}')
    results["grown_memory_mib"] = resident_mib(operator.pid)
    results["grown_peak_mib"] = resident_mib(operator.pid, "VmHWM")
    cpu, begin = cpu_seconds(operator.pid), time.monotonic()
    await asyncio.sleep(options.idle)
    results["grown_idle_cores"] = (cpu_seconds(operator.pid) - cpu) / (time.monotonic() - begin)
    cpu, begin = cpu_seconds(operator.pid), time.monotonic()
    operator.get("/metrics")
    results["grown_scrape_s"] = time.monotonic() - begin
    results["grown_scrape_cpu_s"] = cpu_seconds(operator.pid) - cpu
    return results


async def bench(options: argparse.Namespace, plane: ControlPlane) -> dict[str, float]:  # noqa: PLR0915 - a protocol, step by step
    """Run everything; return the figures by name."""

    def login() -> kopf.ConnectionInfo:
        config = json.loads(plane.kubeconfig.read_text(encoding="utf-8"))
        user = config["users"][0]["user"]
        return kopf.ConnectionInfo(
            server=plane.url, ca_path=str(plane.ca_file), certificate_path=user["client-certificate"],
            private_key_path=user["client-key"],
        )  # fmt: skip

    client = Client(login, user_agent="benchmark")
    plane.admin.create(("v1", "namespaces"), None, {"metadata": {"name": NAMESPACE}})
    await until(lambda: plane.admin.find(("v1", "serviceaccounts"), NAMESPACE, "default"))
    world, runner = World(plane, client), await trainers()
    threading.Thread(target=world.watch, args=(asyncio.get_running_loop(),), daemon=True).start()
    player = asyncio.create_task(world.play())
    shipped = (
        f"--scrape-seconds={Options().scrape_seconds}", f"--relist-seconds={Options().relist_seconds}",
        f"--progress-write-seconds={Settings().progress_write_seconds}", "--scrape-by=pod-ip",
    )  # fmt: skip
    operator = OperatorProcess(plane.kubeconfig, *shipped, preloaded=False)
    grown = OperatorProcess(plane.kubeconfig, *shipped, namespaces=GROWN, preloaded=False)
    results = Figures()
    try:
        operator.start()
        await until(lambda: operator.get("/readyz")[0] == 200)
        results["memory_empty_mib"] = resident_mib(operator.pid)
        shares = {"busy": operator.pid, "busy_apiserver": plane.pid("kube-apiserver"), "busy_etcd": plane.pid("etcd"),
                  "busy_benchmark": os.getpid()}  # fmt: skip
        cpu, begin = {name: cpu_seconds(pid) for name, pid in shares.items()}, time.monotonic()
        waits = await arrive(client, world, options.jobs, options.rate)
        results["arrival_s"] = time.monotonic() - begin
        for name, pid in shares.items():
            results[f"{name}_cores"] = (cpu_seconds(pid) - cpu[name]) / results["arrival_s"]
        results["create_to_child_p50_s"] = statistics.median(waits)
        results["create_to_child_p99_s"] = percentile(waits, 0.99)
        # Every job must run before what is idle can be measured.
        await until(
            lambda: operator.metric(f'dpo_operator_jobs{{namespace="{NAMESPACE}",state="Running"}}') >= options.jobs
        )
        # Each trainer has been asked once.
        round_seconds = 1.2 * pace(Options().scrape_seconds, options.jobs) + 5.0
        await asyncio.sleep(round_seconds)
        cpu, begin, before = cpu_seconds(operator.pid), time.monotonic(), await versions(client)
        await asyncio.sleep(options.idle)
        seconds = time.monotonic() - begin
        results["idle_cores"] = (cpu_seconds(operator.pid) - cpu) / seconds
        after = await versions(client)
        results["idle_status_writes_per_job_minute"] = (
            sum(before[name] != after[name] for name in before) / options.jobs / seconds * 60
        )
        results["memory_mib"] = resident_mib(operator.pid)
        changes = await finish(client, [f"job-{index:04}" for index in range(min(30, options.jobs))])
        results["change_to_status_p50_s"] = statistics.median(changes)
        results["change_to_status_max_s"] = max(changes)

        operator.kill()
        writes = Writes(plane)
        begin = time.monotonic()
        operator.start()
        await until(lambda: operator.get("/readyz")[0] == 200)
        results["restart_ready_s"] = time.monotonic() - begin
        passes = "dpo_operator_reconcile_duration_seconds_count"
        await until(
            lambda: operator.metric(passes) >= options.jobs and operator.metric("dpo_operator_queue_depth") == 0
        )
        results["restart_steady_s"] = time.monotonic() - begin
        # The trainers are asked again one after the other: what that leads to is the restart's too.
        await asyncio.sleep(round_seconds)
        if writes.ended:
            raise RuntimeError("the watch of DPOJobs ended: not all writes were seen")
        writes.enough = True
        results["restart_status_writes"] = writes.others
        results["restart_progress_writes"] = writes.progress
        results["restart_children_made"] = len(world.seen) - options.jobs

        with busy(2):
            waits = await arrive(client, world, max(1, options.jobs // 5), options.rate, "loaded")
        results["loaded_create_to_child_p50_s"] = statistics.median(waits)
        results["loaded_create_to_child_p99_s"] = percentile(waits, 0.99)
        results["exceptions"] = len(operator.exceptions())
        if options.finished:
            results |= await grow(options, plane, client, world, operator, grown)
            results["exceptions"] += len(grown.exceptions())
    finally:
        print(operator.log()[-1500:], grown.log()[-1500:], file=sys.stderr)
        operator.kill()
        grown.kill()
        world.stop()
        player.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await player
        await runner.cleanup()
        await client.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="The operator under many jobs.")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0, help="jobs a second")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds over which idle CPU is measured")
    parser.add_argument("--finished", type=int, default=10_000, help="finished jobs of 8 pods; 0: not that part")
    options = parser.parse_args()
    plane = ControlPlane(nodes=False, frugal=False)
    try:
        plane.start(training_operator=False)
        plane.install_crd(pytorchjob_crd())
        results = asyncio.run(bench(options, plane))
    finally:
        plane.stop()
    results["status_bytes"] = status_bytes()
    for name, value in results.items():
        goal = GOALS.get(name)
        verdict = (
            ""
            if goal is None
            else f"   goal < {goal:g}: {'met' if value < goal else 'MISSED'} (ratio {value / goal:.2f})"
        )
        print(f"{name:36} {value:10.3f}{verdict}")
    print(json.dumps({"jobs": options.jobs, "rate": options.rate, **{k: round(v, 4) for k, v in results.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
