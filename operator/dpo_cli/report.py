"""`dpo report`: reads a run directory and draws its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from dpo_api.errors import DPOError, InvalidDataError, NotFoundError
from dpo_api.manifest import parse_job
from dpo_api.progress import LastWords
from dpo_cli.metrics_log import MetricsLog, attempt_of, merge, parse_events
from dpo_cli.page import Report, render_page
from dpo_store import Store, base_name, join_uri

REPORT = "report.html"
SPEC = "spec.json"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Written:
    """Where a report was written, and the series that it shows."""

    uri: str
    log: MetricsLog


def read_log(store: Store, run_dir: str) -> MetricsLog:
    """Return the metrics of every attempt in a run directory; an empty log if none has written any."""
    events = []
    for name in [
        *store.children(run_dir),
        *(f"metrics/{child}" for child in store.children(join_uri(run_dir, "metrics"))),
    ]:
        attempt = attempt_of(name)
        if attempt is not None:
            events += parse_events(name, store.read(join_uri(run_dir, name)), attempt)
    return merge(events)


def _json_object(store: Store, run_dir: str, name: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(store.read(join_uri(run_dir, name)))
    except NotFoundError:
        return None
    except ValueError:
        raise InvalidDataError(f"{join_uri(run_dir, name)}: not JSON; is it cut short?") from None
    if not isinstance(value, dict):
        raise InvalidDataError(f"{join_uri(run_dir, name)}: not a JSON object")
    return value


def read_spec(store: Store, run_dir: str) -> Mapping[str, Any] | None:
    """Return the job in a run directory, not validated; None if there is none."""
    return _json_object(store, run_dir, SPEC)


def read_end(store: Store, run_dir: str) -> LastWords | None:
    """Return how the run ended, if `dpo run` or the trainer recorded it."""
    found = _json_object(store, run_dir, SUMMARY)
    try:
        return None if found is None else LastWords.model_validate(found)
    except ValidationError:
        return None


def write_report(store: Store, run_dir: str, job: Mapping[str, Any] | None, ended: LastWords | None) -> Written:
    """Write report.html into a run directory; `job` is a DPOJob as JSON.

    Raises NotFoundError if there is nothing to draw.
    """
    log = read_log(store, run_dir)
    if not log.series and job is None:
        raise NotFoundError(f"{run_dir}: neither metrics.jsonl nor spec.json is here; is it a run directory?")
    given = _mapping(job, "spec")
    name = _mapping(job, "metadata").get("name") or base_name(run_dir)
    page = render_page(Report(str(name), run_dir, log, given, _effective(job), ended, datetime.now(UTC)))
    uri = join_uri(run_dir, REPORT)
    store.write(uri, page.encode())
    return Written(uri, log)


def _mapping(job: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    value = None if job is None else job.get(key)
    return value if isinstance(value, Mapping) else {}


def _effective(job: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the spec with all defaults; empty for a spec that this version cannot read."""
    try:
        return {} if job is None else parse_job(job, stored=True).spec.model_dump(mode="json", by_alias=True)
    except DPOError:
        return {}


def redraw(store: Store, run_dir: str) -> Written:
    """Write report.html again from the files of the run directory."""
    return write_report(store, run_dir, read_spec(store, run_dir), read_end(store, run_dir))
