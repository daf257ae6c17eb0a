"""What a caller may set, and the one record that describes an object."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

from dpo_api.errors import InvalidSpecError

MIB: Final = 1024 * 1024
READ_AHEAD: Final = 16 * MIB
"""Bytes of an object that are read from S3 ahead of the caller, unless it says otherwise."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object or file.

    ``etag`` names the exact content: S3's ETag (with its quotes), or for a file its inode, size and time of change.
    Empty if the server gives none, and then a change during a read goes unnoticed unless the size changes.
    """

    uri: str
    size: int
    etag: str = ""


class _StorageSection(Protocol):
    """The part of dpo_api's StorageSpec that reaches the client; read-only, so that frozen models fit."""

    @property
    def endpoint(self) -> str | None: ...
    @property
    def region(self) -> str | None: ...
    @property
    def force_path_style(self) -> bool | None: ...


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How to reach S3. Holds no credentials, so it may be logged.

    :func:`dpo_store.access.options_of` makes them from a spec.

    endpoint: URL of an S3-compatible server; None: ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or Amazon's own.
    region: None: boto3's usual sources, then us-east-1.
    force_path_style: True: ``endpoint/bucket/key``; False: ``bucket.endpoint/key``; None: path style for an explicit
        endpoint, as boto3 does.
    ca_bundle: path of a PEM file of certificate authorities; None: ``AWS_CA_BUNDLE`` or the system's.
    credentials: folder with the files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps AWS_SESSION_TOKEN, as a pod
        gets them from a Secret; None: boto3's usual chain.
    environment_keys: whether that chain begins with the keys in the environment. False where they belong to another
        endpoint, which no request may then show them to.
    hub_cache: folder for files of the Hugging Face Hub; None: each read is a request, and nothing is kept.
    pvc_root: folder under which claims are mounted by name; None: ``DPO_PVC_ROOT``.
    """

    endpoint: str | None = None
    region: str | None = None
    force_path_style: bool | None = None
    ca_bundle: str | None = None
    credentials: str | None = None
    environment_keys: bool = True
    hub_cache: str | None = None
    pvc_root: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint is None:
            return
        parts = urlsplit(self.endpoint)
        if parts.username is not None or parts.password is not None:
            raise InvalidSpecError(
                "storage.endpoint must not hold credentials; put them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidSpecError(f"storage.endpoint: {self.endpoint!r} is not a URL like https://s3.example.com")

    @classmethod
    def of(
        cls,
        section: _StorageSection,
        *,
        ca_bundle: str | None = None,
        credentials: str | None = None,
        environment_keys: bool = True,
    ) -> StorageOptions:
        """Return the options that one complete storage section stands for."""
        return cls(
            endpoint=section.endpoint,
            region=section.region,
            force_path_style=section.force_path_style,
            ca_bundle=ca_bundle,
            credentials=credentials,
            environment_keys=environment_keys,
        )


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again, and when to give up. Times in seconds.

    attempts: failures in a row, without progress between them, before giving up. Twelve wait 75 s on average, and
        almost never less than 30 s: an object store that is restarted costs no attempt.
    base, cap: the n-th wait is uniform on [0, min(cap, base * 2**n)]: "full jitter".
    connect_timeout, read_timeout: of the socket; read_timeout is the longest silence between two bytes.
    slow_window, slow_bytes: a body that brings fewer than slow_bytes in slow_window seconds is dropped and asked for
        again from the byte reached.
    """

    attempts: int = 12
    base: float = 0.5
    cap: float = 20.0
    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    slow_window: float = 30.0
    slow_bytes: int = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Clock, sleep and randomness, so that tests need not wait. ``random`` is uniform on [0, 1)."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
