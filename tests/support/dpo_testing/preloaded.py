"""`python -m dpo_trainer` and `python -m dpo_cli` without the seconds of imports: forked from a server that has them.

A run starts a chain of processes: launcher, torchrun's agent, workers; or the `dpo` command before them. Each would
import torch and Megatron-Core again. Here one server a test process imports them once. ``PreloadedPopen`` looks like
``subprocess.Popen`` and asks the server for a fork, which runs the module's ``__main__`` as ``python -m`` does: same
arguments, environment, working directory, file descriptors, session, signal handling and exit code. What such a process
starts with ``[sys.executable, "-m", one of MODULES, ...]`` is forked too; everything else is executed as usual.

Parents are real, because the product depends on it (``waitpid``, the parent-death signal): a process that may start
others keeps a helper, forked before it has threads. The helper forks twice, and the orphan becomes a child of the
process that asked, which is its subreaper. Only the first process of a chain is a child of the server, which reports
how it ended.

What a fork cannot show is a fresh interpreter's start: tests of that use ``subprocess.Popen`` (``runs.start`` with
``preloaded=False``). Where there is a GPU, everything is started for real: CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    "dpo_trainer",
    "dpo_cli",
    "dpo_testing.probe",
    "dpo_testing.rogue",
    "dpo_testing.checkpoint_ranks",
    "dpo_testing.gloo",
    "dpo_testing.impatient",
    "dpo_testing.gpu_phase",
)
PRELOADED = (
    "dpo_trainer.worker",
    "dpo_trainer.agent",
    "torch.distributed.run",
    "dpo_cli.app",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "torch._inductor",  # by the first optimizer
    "megatron.core.models.mimo.optimizer",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "boto3",
    "dpo_store.s3",
)
"""What the server imports."""

READ_AT_IMPORT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "LD_PRELOAD")
"""Variables that have had their effect before a fork: one that differs from the server's is refused."""

NOTES = "DPO_TESTING_PROCESSES"
"""Environment variable: a folder in which each forked process leaves its arguments and its rank, by process id."""

STEP_SECONDS = "DPO_TESTING_STEP_SECONDS"
"""Environment variable: seconds that a worker waits before each step, so that a test finds the run under way."""

NETWORK = "DPO_TESTING_NETWORK"
"""Environment variable: the file of the network namespace that a process enters, such as /proc/N/ns/net."""

HURRY = "DPO_TESTING_HURRY"
"""Environment variable: a file; once it exists, a worker waits for others for seconds only (dpo_testing.impatient)."""

_PACKET = 180_000  # bytes; Linux takes about 200 KB in one packet of a socket
_SET_CHILD_SUBREAPER = 36
_Popen = subprocess.Popen
_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def usable() -> bool:
    """Whether processes are forked from a server here."""
    return sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


def _forkable(args: Any) -> bool:
    """Whether a command is `python -m` of one of MODULES; torchrun adds `-u`."""
    words = [word for word in args if word != "-u"] if isinstance(args, list | tuple) else []
    return len(words) > 2 and words[0] == sys.executable and words[1] == "-m" and words[2] in MODULES


class PreloadedPopen(subprocess.Popen[Any]):
    """``subprocess.Popen`` for `python -m` of one of MODULES; the process is forked from this test process's server."""

    preload: tuple[str, ...] = PRELOADED

    def _execute_child(self, args: Any, *rest: Any) -> None:
        self._fate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            _ask(_server(self.preload), self, args, rest, theirs)
        self.pid = _answer(self._fate)
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._fate.settimeout(0.0 if wait_flags & os.WNOHANG else None)
        try:
            status = _answer(self._fate)
        except BlockingIOError:
            return 0, 0
        self._fate.close()
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        # Of subprocess.Popen, with the server in waitpid's place.
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _answer(fate: socket.socket) -> int:
    packet = fate.recv(16)
    if not packet:
        raise RuntimeError("the server of preloaded processes is gone; what it printed is in this test's output")
    return int(struct.unpack("q", packet)[0])


@cache
def _server(preload: tuple[str, ...]) -> socket.socket:
    """Start this test process's server with these modules, once; it ends with this process."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packages = os.pathsep.join(str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support"))
    # huggingface_hub reads the last one when it is imported; dpo_testing.hubserver has no Xet.
    environment = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    with its:
        command = [sys.executable, "-m", "dpo_testing.preloaded", str(its.fileno()), *preload]
        server = _Popen(command, env=environment, pass_fds=[its.fileno()], start_new_session=True)

    def end() -> None:
        mine.close()
        server.wait()

    atexit.register(end)
    return mine


def _ask(control: socket.socket, popen: subprocess.Popen[Any], args: Any, rest: tuple[Any, ...], fate: Any) -> None:
    """Send one request: what ``subprocess.Popen._execute_child`` got, as far as anybody here uses it."""
    names = "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite c2pread"
    names += " c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session process_group"
    given = dict(zip(names.split(), rest, strict=True))
    if given["preexec_fn"] or given["pass_fds"] or given["shell"] or given["executable"]:
        raise ValueError("a preloaded process takes no preexec_fn, pass_fds, shell or executable")
    environment = os.environ if given["env"] is None else given["env"]
    request = {
        "args": [os.fspath(word) for word in args],
        "cwd": os.fspath(given["cwd"] or Path.cwd()),
        "env": dict(environment),
        "session": bool(given["start_new_session"]),
    }
    packet = json.dumps(request).encode()
    if len(packet) > _PACKET:
        raise ValueError(f"the request has {len(packet)} bytes, more than {_PACKET}")
    streams = [
        place if found == -1 else found
        for place, found in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"]))
    ]
    socket.send_fds(control, [packet], [*streams, fate.fileno()])
    popen._close_pipe_fds(  # type: ignore[attr-defined]
        *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
    )


# -- in the server and in the helpers


def _serve(control: socket.socket, parent: int | None) -> None:
    """Fork a process for each request until the other side is gone.

    parent: the process whose children they become; None: they are this one's, which reports how they end.
    """
    fates: dict[int, socket.socket] = {}
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as ready:
        ready.register(control, selectors.EVENT_READ)
        ready.register(read, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is control:
                    packet, files, _, _ = socket.recv_fds(control, _PACKET + 1, 4)
                    if not packet:
                        return
                    fate = socket.socket(fileno=files[3])
                    pid = _fork(json.loads(packet), files[:3], parent, fate)
                    for file in files[:3]:
                        os.close(file)
                    if parent is None:
                        fates[pid] = fate
                        _tell(fate, pid)
                    else:
                        fate.close()
                else:
                    with suppress(BlockingIOError):
                        os.read(read, 4096)
            _reap(fates)


def _reap(fates: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if fate := fates.pop(ended[0], None):
                _tell(fate, ended[1])
                fate.close()


def _tell(fate: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits any more
        fate.send(struct.pack("q", number))


def _fork(request: Mapping[str, Any], streams: list[int], parent: int | None, fate: socket.socket) -> int:
    """Fork the process, once or, for a child of ``parent``, twice."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if parent is not None:
            if os.fork():
                os._exit(0)
            _wait_for_parent(parent)
            _tell(fate, os.getpid())  # only now can the parent wait for it
        _become(request, streams)
    except BaseException:  # noqa: BLE001 - a forked copy never returns to its original's loop
        traceback.print_exc()
    os._exit(70)


def _wait_for_parent(parent: int) -> None:
    """Wait until the process between this one and ``parent`` has ended, so that ``parent`` has adopted this one."""
    deadline = time.monotonic() + 60
    while os.getppid() != parent:
        if not Path(f"/proc/{parent}").exists():
            os._exit(1)
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {parent} did not adopt the process that it asked for")
        os.sched_yield()


def _become(request: Mapping[str, Any], streams: list[int]) -> NoReturn:
    """Turn this copy of the server into the interpreter that was asked for, run it, and exit."""
    if request["session"]:
        os.setsid()
    for place, file in enumerate(streams):
        os.dup2(file, place)
    os.closerange(3, 4096)
    if network := request["env"].get(NETWORK):
        _enter(network)
    for name in READ_AT_IMPORT:
        if request["env"].get(name) != os.environ.get(name) and (name, request["env"].get(name)) != _NO_GPU:
            raise ValueError(f"{name} is read at import; {request['env'].get(name)!r} is not the server's")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = request["args"]
    _open_streams(unbuffered="-u" in words[:2] or bool(request["env"].get("PYTHONUNBUFFERED")))
    random.seed()
    if folder := request["env"].get(NOTES):
        _leave_note(Path(folder), words)
    module, *arguments = words[words.index("-m") + 1 :]
    if arguments[:1] != ["worker"] and module != "dpo_operator":  # which start nobody
        _keep_helper()
    sys.argv = [module, *arguments]
    if arguments[:1] == ["worker"] and (seconds := request["env"].get(STEP_SECONDS)):
        _slow_down(float(seconds))
    if arguments[:1] == ["worker"] and (flag := request["env"].get(HURRY)):
        from dpo_testing.impatient import hurry

        hurry(Path(flag))
    code = _run(module)
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(BaseException):
        atexit._run_exitfuncs()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120  # as the interpreter does
    os._exit(code & 0xFF)


def _enter(network: str) -> None:
    file = os.open(network, os.O_RDONLY)
    os.setns(file, os.CLONE_NEWNET)
    os.close(file)


def _slow_down(seconds: float) -> None:
    from dpo_trainer.training import Training

    step = Training._one_step

    def slowly(self: Training) -> None:
        time.sleep(seconds)
        step(self)

    Training._one_step = slowly  # type: ignore[method-assign]


_NO_GPU = ("CUDA_VISIBLE_DEVICES", "")  # where there is no GPU it says nothing new


def _open_streams(*, unbuffered: bool) -> None:
    """Standard streams as a new interpreter opens them."""

    def opened(file: int, mode: str, errors: str) -> io.TextIOWrapper:
        raw = io.open(file, mode, buffering=0 if unbuffered and mode == "wb" else -1, closefd=False)  # noqa: UP020, SIM115
        lines = mode == "wb" and (os.isatty(file) or file == 2)
        return io.TextIOWrapper(raw, "utf-8", errors, line_buffering=lines, write_through=unbuffered)

    sys.stdin = opened(0, "rb", "strict")
    sys.stdout = sys.__stdout__ = opened(1, "wb", "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = opened(2, "wb", "backslashreplace")  # type: ignore[misc]


def _leave_note(folder: Path, words: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}"
    partial.write_text(json.dumps({"args": words, "rank": os.environ.get("RANK")}))
    partial.rename(folder / str(os.getpid()))


def _keep_helper() -> None:
    """Let this process's own ``subprocess.Popen`` fork what can be forked: a helper does it, and it is our child."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.getpid()
    if os.fork() == 0:
        mine.close()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for place in range(3):
            os.dup2(null, place)
        _serve(its, owner)
        os._exit(0)
    its.close()
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def execute_child(popen: subprocess.Popen[Any], args: Any, *rest: Any) -> None:
        if not _forkable(args):
            _execute(popen, args, *rest)
            return
        fate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with fate, theirs:
            _ask(mine, popen, args, rest, theirs)
            popen.pid = _answer(fate)
        popen._child_created = True  # type: ignore[attr-defined]

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


def _run(module: str) -> int:
    """Run a module as ``python -m`` does; return the exit code as the interpreter finds it."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None:
            return 0
        if isinstance(end.code, int):
            return end.code
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except BaseException:  # noqa: BLE001 - the interpreter prints it, too
        traceback.print_exc()
        return 1
    return 0


def _main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    preload = sys.argv[2:]
    for module in preload:
        __import__(module)
    if s3 := sys.modules.get("dpo_store.s3"):
        s3.service_descriptions().load_service_model("s3", "service-2")
    busy = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]  # noqa: PTH208
    if busy:
        raise RuntimeError(f"importing {', '.join(preload)} has started {len(busy)} threads, which no fork has")
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    _serve(control, None)


if __name__ == "__main__":
    _main()
