"""The S3 server of the cluster: versitygw on the bridge's address, with objects that outlive its process."""

from __future__ import annotations

import json
import os
import secrets
import signal
import urllib.error
import urllib.request

from dpo_testing.realcluster import daemons
from dpo_testing.realcluster.layout import GATEWAY, S3_PORT, Layout
from dpo_testing.s3server import S3Server, tool

ENDPOINT = f"http://{GATEWAY}:{S3_PORT}"
BUCKET = "dpo-e2e"
"""The story's own."""
_NAME = "versitygw"


def start(layout: Layout) -> S3Server:
    """Start it unless it runs; the credentials are the run folder's."""
    found = server(layout)
    base = layout.run / "s3"
    (base / "metadata").mkdir(exist_ok=True)
    daemons.start(
        layout,
        _NAME,
        [tool("versitygw"), "--port", f"{GATEWAY}:{S3_PORT}", "--quiet", "--keep-alive",
         "posix", "--sidecar", base / "metadata", found.folder],
        {"ROOT_ACCESS_KEY": found.access_key, "ROOT_SECRET_KEY": found.secret_key},
    )  # fmt: skip
    daemons.wait_until(layout, _NAME, _answers, 20)
    return found


def stop(layout: Layout) -> None:
    """Stop it as an outage would: connections end at once."""
    daemons.stop(layout, _NAME, signal.SIGKILL)


def empty(layout: Layout, prefix: str = "") -> None:
    """Delete the bucket's objects below a prefix; the bucket stays."""
    client = server(layout).client()
    if BUCKET not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        return
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])


def server(layout: Layout) -> S3Server:
    """Return the server's address, credentials and folder."""
    elsewhere = os.environ.get("E2E_S3_ENDPOINT")
    if elsewhere:
        keys = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        return S3Server(elsewhere, *keys, layout.run)
    base = layout.run / "s3"
    folder = base / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    kept = base / "keys.json"
    if not kept.exists():
        kept.touch(mode=0o600)
        kept.write_text(json.dumps(["AK" + secrets.token_hex(9).upper(), secrets.token_urlsafe(30)]))
    access, secret = json.loads(kept.read_text())
    return S3Server(ENDPOINT, access, secret, folder)


def _answers() -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ENDPOINT, timeout=2).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    return True
