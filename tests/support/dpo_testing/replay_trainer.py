"""Replaces the trainer in tests of the screen: replays recorded progress, then ends as the recording says.

The script is a JSON file named by $DPO_REPLAY: {"events": [Progress, …], "metrics": [line, …], "log": text,
"lastWords": {…} | null, "code": int, "hang": bool, "ignoreTerm": bool, "claimed": bool (spec.json is written)}.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dpo_store import join_uri, open_store


def main() -> int:
    if sys.argv[1] == "index":
        return index()
    parser = argparse.ArgumentParser()
    for name in ("spec", "run-dir", "events", "last-words", "processes", "grace-seconds", "port", "host"):
        parser.add_argument(f"--{name}")
    arguments = parser.parse_args(sys.argv[2:])
    script = json.loads(Path(os.environ["DPO_REPLAY"]).read_text())
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    store, run_dir = open_store(), arguments.run_dir
    if script.get("claimed", True):
        store.write(join_uri(run_dir, "spec.json"), Path(arguments.spec).read_bytes())
    store.write(join_uri(run_dir, "arguments.json"), json.dumps(vars(arguments)).encode())
    metrics = "".join(json.dumps(line) + "\n" for line in script.get("metrics", []))
    store.write(join_uri(run_dir, "metrics.jsonl"), metrics.encode())
    if "childSleeps" in script:
        sleep = [sys.executable, "-c", f"import time; time.sleep({script['childSleeps']})"]
        child = subprocess.Popen(sleep, start_new_session=True)
        store.write(join_uri(run_dir, "pids"), f"{os.getpid()} {child.pid}".encode())
    print(script.get("log", ""), flush=True)
    with Path(arguments.events).open("a") as events:
        for event in script.get("events", []):
            events.write(json.dumps({"observedAt": time.time(), **event}) + "\n")
            events.flush()
            time.sleep(script.get("pause", 0.0))
    while script.get("hang") and (not stopped or script.get("ignoreTerm")):
        time.sleep(0.02)
    words, code = script.get("lastWords"), script.get("code", 0)
    if stopped:
        words, code = script.get("stoppedWords", {"outcome": "Stopped", "step": 2, "total": 4}), 143
    if words is not None:
        Path(arguments.last_words).write_text(json.dumps(words))
    return int(code)


def index() -> int:
    script = json.loads(Path(os.environ["DPO_REPLAY"]).read_text())
    print(script.get("log", ""), file=sys.stderr)
    if "index" in script or "lastWords" in script:
        print(json.dumps(script.get("index") or script["lastWords"]))
    return int(script.get("code", 0))


if __name__ == "__main__":
    raise SystemExit(main())
