"""S3 through boto3, with our own retries: one request of boto3's is one request on the wire."""

from __future__ import annotations

import builtins  # `list` is a method here
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from dpo_api.errors import AccessDeniedError, InvalidSpecError, NotFoundError, StorageUnavailableError
from dpo_store import multipart, ranges, retry
from dpo_store.errors import Rule, rule_of_code
from dpo_store.options import ObjectInfo, RetryPolicy, StorageOptions, Timing
from dpo_store.uris import Location

if TYPE_CHECKING:
    from botocore.loaders import Loader as BotocoreLoader
    from botocore.session import Session as BotocoreSession
    from mypy_boto3_s3 import S3Client

_WORD: Final = re.compile(r"[A-Za-z]{1,48}")
_KEYS: Final = {
    "AWS_ACCESS_KEY_ID": "aws_access_key_id",
    "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key",
    "AWS_SESSION_TOKEN": "aws_session_token",
}
"""Files of a credentials folder, and boto3's names for what they hold."""
_VAGUE: Final = frozenset({"400", "401", "403", "301", "307", "BadRequest", "Forbidden"})
"""Codes of HEAD answers, which have no body to say more."""


_OTHERS_KEYS: Final = (
    "no S3 credentials for this endpoint, and those of spec.storage belong to another one; name a Secret by"
    " credentialsSecretRef beside this endpoint (on one machine: its keys are files in $DPO_CREDENTIALS_DIR/NAME/)"
)


@cache
def service_descriptions() -> BotocoreLoader:
    """Return what botocore knows of AWS's services. It keeps what it has parsed: most of the CPU of a new client."""
    from botocore.loaders import create_loader
    from botocore.session import get_session

    return create_loader(get_session().get_config_variable("data_path"))


def _chain(options: StorageOptions) -> BotocoreSession:
    """Return boto3's usual search for keys; without the environment where its keys are another endpoint's."""
    from botocore.session import get_session

    session = get_session()
    session.register_component("data_loader", service_descriptions())
    if not options.environment_keys:
        session.get_component("credential_provider").remove("env")
    return session


def _keys(folder: str | None) -> dict[str, Any]:
    """Read a credentials folder. Raises AccessDeniedError for a file that is missing or may not be read."""
    if folder is None:
        return {}
    keys: dict[str, Any] = {}
    for name, parameter in _KEYS.items():
        try:
            keys[parameter] = (Path(folder) / name).read_text(encoding="utf-8").strip()
        except OSError as error:
            if name != "AWS_SESSION_TOKEN":
                text = f"storage.credentialsSecretRef: the Secret {Path(folder).name} gives no readable {name}"
                raise AccessDeniedError(text) from error
    return keys


class S3Backend:
    """The operations of a Store on S3."""

    def __init__(self, options: StorageOptions, policy: RetryPolicy, timing: Timing) -> None:
        self._options = options
        self._policy = policy
        self._timing = timing
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def client(self) -> S3Client:
        """The boto3 client, made at first use (clients are safe for threads, making one is not)."""
        with self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _make_client(self) -> S3Client:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        options = self._options
        styles: dict[bool | None, Literal["auto", "path", "virtual"]] = {None: "auto", True: "path", False: "virtual"}
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self._policy.connect_timeout,
            read_timeout=self._policy.read_timeout,
            max_pool_connections=32,
            tcp_keepalive=True,
            s3={"addressing_style": styles[options.force_path_style]},
            # Newer boto3 adds CRC headers and trailers that many S3-compatible servers reject.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        if options.ca_bundle is not None and not Path(options.ca_bundle).is_file():
            raise InvalidSpecError(f"storage.caBundle: {options.ca_bundle} does not exist")
        try:
            session = boto3.session.Session(botocore_session=_chain(options), **_keys(options.credentials))
            return session.client(
                "s3",
                endpoint_url=options.endpoint,
                region_name=options.region or session.region_name or "us-east-1",
                verify=options.ca_bundle,
                config=config,
            )
        except BotoCoreError as error:
            found = retry.explain(error)
            if found is None:
                raise InvalidSpecError(f"storage: the S3 client cannot be set up ({type(error).__name__})") from error
            raise found[0].error(f"storage: {found[1]}") from error
        except ValueError as error:  # botocore's word for an endpoint that is not a URL
            raise InvalidSpecError(f"storage.endpoint: {options.endpoint!r} is not a valid URL") from error

    def patience(self, subject: str) -> retry.Patience:
        """Return a new count of failures for one operation."""
        return retry.Patience(subject, self._policy, self._timing, self._explain)

    def _explain(self, error: BaseException) -> tuple[Rule, str] | None:
        response = getattr(error, "response", None)
        if not isinstance(response, dict) or "Error" not in response:
            found = retry.explain(error)
            keyless = found is not None and type(error).__name__ == "NoCredentialsError"
            return (found[0], _OTHERS_KEYS) if found and keyless and not self._options.environment_keys else found
        code = str(response["Error"].get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        rule = rule_of_code(code, status)
        # The server's own message is left out: some echo parts of the signed request.
        text = f"{rule.text} ({code})" if _WORD.fullmatch(code) else rule.text
        return rule, text

    def _run[T](self, subject: str, attempt: Callable[[], T]) -> T:
        return self.patience(subject).run(attempt)

    def stat(self, location: Location) -> ObjectInfo:
        """Describe one object."""
        uri = str(location)
        if not location.path or location.path.endswith("/"):
            raise NotFoundError(f"{uri}: is a folder, not an object")

        def attempt() -> ObjectInfo:
            head = self.client.head_object(Bucket=location.root, Key=location.path)
            return ObjectInfo(uri, head["ContentLength"], head.get("ETag", ""))

        from botocore.exceptions import ClientError

        try:
            return self._run(uri, attempt)
        except (AccessDeniedError, InvalidSpecError, StorageUnavailableError) as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and str(cause.response["Error"].get("Code")) in _VAGUE:
                return self._stat_by_get(location)
            raise

    def _stat_by_get(self, location: Location) -> ObjectInfo:
        """Repeat a refused HEAD as a GET of one byte: a refusal of that has a body that says why.

        It may also succeed, once boto3 has learnt the bucket's region from the first answer.
        """

        def attempt() -> ObjectInfo:
            answer = self.client.get_object(Bucket=location.root, Key=location.path, Range="bytes=0-0")
            answer["Body"].close()
            total = answer.get("ContentRange", "").rpartition("/")[2]
            return ObjectInfo(
                str(location), int(total) if total.isdigit() else answer["ContentLength"], answer.get("ETag", "")
            )

        return self._run(str(location), attempt)

    def list(self, location: Location) -> Iterator[ObjectInfo]:
        """Describe every object whose key starts with the location's path, in the keys' order."""
        for page in self._pages(location):
            for entry in page.get("Contents", ()):
                # A key that ends in "/" is a console's way to draw a folder.
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(str(location.at(entry["Key"])), entry["Size"], entry.get("ETag", ""))

    def keys_below(self, location: Location) -> Iterator[str]:
        """Yield the address of every key that starts with the location's path, drawn folders included."""
        for page in self._pages(location):
            yield from (str(location.at(entry["Key"])) for entry in page.get("Contents", ()))

    def children(self, location: Location) -> builtins.list[str]:
        """Return the names in a folder, sorted, those of folders with ``/`` at the end."""
        names: set[str] = set()
        for page in self._pages(location, Delimiter="/"):
            names.update(entry["Prefix"][len(location.path) :] for entry in page.get("CommonPrefixes", ()))
            names.update(entry["Key"][len(location.path) :] for entry in page.get("Contents", ()))
        return sorted(names - {""})

    def _pages(self, location: Location, **more: str) -> Iterator[Any]:
        while True:
            query = dict(more)

            def attempt(query: dict[str, Any] = query) -> Any:
                return self.client.list_objects_v2(Bucket=location.root, Prefix=location.path, **query)

            page = self._run(str(location), attempt)
            yield page
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def buckets(self) -> builtins.list[str]:
        """Return the names of the buckets that the credentials may list."""
        answer = self._run("s3://", self.client.list_buckets)
        return [bucket["Name"] for bucket in answer.get("Buckets", ()) if "Name" in bucket]

    def read(self, location: Location, start: int, length: int | None, known: ObjectInfo | None) -> bytes:
        """Return ``length`` bytes from ``start`` (fewer at the end of the object)."""
        info = known or self.stat(location)
        stop = info.size if length is None else min(info.size, start + length)
        if start >= stop:
            return b""
        return b"".join(self.blocks(location, info, start, stop))

    def blocks(
        self,
        location: Location,
        info: ObjectInfo,
        start: int,
        stop: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[bytes]:
        """Yield the bytes [start, stop) in blocks, with retries; see :mod:`dpo_store.ranges`."""
        return ranges.blocks(
            self.client, location, info, start, stop,
            patience=self.patience(info.uri), policy=self._policy, monotonic=self._timing.monotonic,
            cancelled=cancelled,
        )  # fmt: skip

    def write(self, location: Location, data: bytes) -> None:
        """Store one object in one request."""
        digest = multipart.content_md5(data)

        def attempt() -> None:
            self.client.put_object(Bucket=location.root, Key=location.path, Body=data, ContentMD5=digest)

        self._run(str(location), attempt)

    def write_blocks(self, location: Location, blocks: Iterable[bytes | memoryview], size: int) -> None:
        """Store an object of ``size`` bytes as its blocks arrive; see :mod:`dpo_store.multipart`."""
        multipart.store(self.client, blocks, size, location, self.patience)

    def put_file(self, source: Path, location: Location) -> None:
        """Store a file; see :mod:`dpo_store.multipart`."""
        multipart.upload(self.client, source, location, self.patience)

    def delete(self, location: Location) -> None:
        """Remove an object; no error if there is none."""
        self._run(str(location), lambda: self.client.delete_object(Bucket=location.root, Key=location.path))
