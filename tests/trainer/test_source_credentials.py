"""Sources with credentials and certificates of their own, as a pod gets them: against two real S3 servers."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import AccessDeniedError, DPOError
from dpo_api.spec import DPOJobSpec, StorageAccess
from dpo_cli.stores import Stores
from dpo_store import Store
from dpo_testing.runs import job_of
from dpo_testing.s3server import S3Server, need, no_aws, s3_server
from dpo_trainer.sources import store_for


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[S3Server, S3Server]]:
    need("versitygw")
    with s3_server() as ours, s3_server() as theirs:
        for server, text in ((ours, b"ours"), (theirs, b"theirs")):
            server.make_bucket("prefs")
            server.client().put_object(Bucket="prefs", Key="a.jsonl", Body=text)
        yield ours, theirs


@pytest.fixture
def pod(servers: tuple[S3Server, S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's environment: our keys as variables, the vendor's as files; returns the folder of the Secrets."""
    ours, theirs = servers
    for name, value in no_aws().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ours.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ours.secret_key)
    monkeypatch.setenv("DPO_CREDENTIALS_DIR", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE", "DPO_CA_DIR", "DPO_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "vendor"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(theirs.access_key + "\n")
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(theirs.secret_key)
    return tmp_path


def spec_of(servers: tuple[S3Server, S3Server], **source: Any) -> DPOJobSpec:
    ours, theirs = servers
    return job_of(
        {
            "model": {"huggingFace": {"uri": "s3://models/tiny/"}},
            "data": {
                "train": [
                    {"uri": "s3://prefs/a.jsonl"},
                    {"uri": "s3://prefs/a.jsonl", "storage": {"endpoint": theirs.endpoint} | source},
                ]
            },
            "storage": {"endpoint": ours.endpoint, "credentialsSecretRef": {"name": "common"}},
        }
    ).spec


def read(spec: DPOJobSpec, index: int) -> bytes:
    return store_for(spec, spec.data.train[index].storage).read("s3://prefs/a.jsonl")


def test_each_source_is_read_with_its_own_keys(servers: tuple[S3Server, S3Server], pod: Path) -> None:
    spec = spec_of(servers, credentialsSecretRef={"name": "vendor"})
    assert read(spec, 0) == b"ours"
    assert read(spec, 1) == b"theirs"


class Stranger:
    """An endpoint that is not ours: refuses everything and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        stranger = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stranger.shown.append(f"{self.path} {self.headers}")
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815 - the name that the base class looks for

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    stranger = Stranger()
    thread = threading.Thread(target=stranger.server.serve_forever)
    thread.start()
    yield stranger
    stranger.server.shutdown()
    thread.join()
    stranger.server.server_close()


def openers(spec: DPOJobSpec, access: StorageAccess | None) -> list[Callable[[], Store]]:
    """Every way in which a spec's section becomes a store: the trainer's and the client's."""
    return [lambda: store_for(spec, access), lambda: Stores(spec).reach(access)]


@pytest.mark.parametrize("own", [{}, {"credentialsSecretRef": {"name": "nowhere"}}])
@pytest.mark.parametrize("opener", [0, 1], ids=["trainer", "client"])
def test_no_other_endpoint_is_shown_the_common_keys(
    servers: tuple[S3Server, S3Server],
    pod: Path,
    stranger: Stranger,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, Any],
    opener: int,
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token")
    spec = spec_of(servers, **{**own, "endpoint": stranger.endpoint})
    store = openers(spec, spec.data.train[1].storage)[opener]()
    with pytest.raises(AccessDeniedError, match=r"those of spec\.storage belong to another one; name a Secret by"):
        store.read("s3://prefs/a.jsonl")
    assert not [text for text in stranger.shown if servers[0].access_key in text or "a-session-token" in text]
    # The same endpoint with the keys named for it is shown them, so the stranger does see what it is shown.
    spec = spec_of(servers, endpoint=stranger.endpoint, credentialsSecretRef={"name": "common"})
    with pytest.raises(DPOError):
        openers(spec, spec.data.train[1].storage)[opener]().read("s3://prefs/a.jsonl")
    assert [text for text in stranger.shown if servers[0].access_key in text]


def test_another_endpoint_gets_the_machines_other_keys(
    servers: tuple[S3Server, S3Server], pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the usual chain is searched: here a profile, on a cluster the pod's identity."""
    theirs = servers[1]
    profile = pod / "profile"
    profile.write_text(
        f"[default]\naws_access_key_id = {theirs.access_key}\naws_secret_access_key = {theirs.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    assert read(spec_of(servers), 1) == b"theirs"
    assert read(spec_of(servers), 0) == b"ours"


def test_a_secret_that_lacks_a_key_is_named(servers: tuple[S3Server, S3Server], pod: Path) -> None:
    (pod / "vendor" / "AWS_SECRET_ACCESS_KEY").unlink()
    with pytest.raises(AccessDeniedError, match=r"the Secret vendor gives no readable AWS_SECRET_ACCESS_KEY"):
        read(spec_of(servers, credentialsSecretRef={"name": "vendor"}), 1)


def test_on_one_machine_the_usual_chain_has_the_keys(
    servers: tuple[S3Server, S3Server], pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPO_CREDENTIALS_DIR")
    assert read(spec_of(servers, credentialsSecretRef={"name": "vendor"}), 0) == b"ours"


@pytest.mark.parametrize(
    ("bundle", "place"),
    [
        ({"configMapRef": {"name": "ca"}}, "configmap/ca/ca.crt"),
        ({"secretRef": {"name": "ca"}, "key": "tls.pem"}, "secret/ca/tls.pem"),
    ],
)
def test_a_sources_own_certificates_are_where_the_pod_mounts_them(
    servers: tuple[S3Server, S3Server], pod: Path, monkeypatch: pytest.MonkeyPatch, bundle: dict[str, Any], place: str
) -> None:
    monkeypatch.setenv("DPO_CA_DIR", "/etc/dpo/ca")
    monkeypatch.setenv("DPO_CA_BUNDLE", "/etc/dpo/ca/common")
    with pytest.raises(DPOError, match=f"storage.caBundle: /etc/dpo/ca/{place} does not exist"):
        read(spec_of(servers, caBundle=bundle, credentialsSecretRef={"name": "vendor"}), 1)
