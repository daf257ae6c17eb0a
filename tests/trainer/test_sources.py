"""How a spec's storage sections reach the trainer's stores, without the client's help."""

from typing import Any

import pytest

from dpo_api.errors import InvalidSpecError
from dpo_testing.runs import job_of
from dpo_trainer.sources import store_for

SPEC: dict[str, Any] = {
    "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
    "data": {"train": [{"uri": "s3://prefs/a.jsonl"}]},
}


@pytest.mark.parametrize(
    ("source", "whole", "mounted", "named"),
    [
        ("/nowhere/source.pem", "/nowhere/whole.pem", "/nowhere/mounted.pem", "/nowhere/source.pem"),
        (None, "/nowhere/whole.pem", "/nowhere/mounted.pem", "/nowhere/whole.pem"),
        (None, "/nowhere/whole.pem", None, "/nowhere/whole.pem"),
        (None, None, "/nowhere/mounted.pem", "/nowhere/mounted.pem"),
    ],
)
def test_the_nearest_certificates_count(
    source: str | None, whole: str | None, mounted: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store with a CA bundle that does not exist names it in its error."""
    monkeypatch.delenv("DPO_CA_BUNDLE", raising=False)
    if mounted is not None:
        monkeypatch.setenv("DPO_CA_BUNDLE", mounted)
    data = {"uri": "s3://prefs/a.jsonl"} | ({"storage": {"caBundle": {"path": source}}} if source else {})
    storage = {"caBundle": {"path": whole}} if whole else {}
    spec = job_of({**SPEC, "data": {"train": [data]}, "storage": storage}).spec
    with pytest.raises(InvalidSpecError, match=rf"storage\.caBundle: {named}"):
        store_for(spec, spec.data.train[0].storage).expand("s3://prefs/a.jsonl")
