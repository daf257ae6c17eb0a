"""Addresses: parsing, joining, and the way from ``file://`` and ``pvc://`` to a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote

from dpo_api.errors import InvalidSpecError, NotFoundError

Scheme = Literal["s3", "hf", "file", "pvc", "path"]

REMOTE: Final = ("s3", "hf")

_SCHEME: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_CLAIM: Final = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
_REPOSITORY: Final = re.compile(r"^((datasets/)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w.-]*)?)(/.*)?$")
_BUCKET: Final = re.compile(r"^[A-Za-z0-9._-]{1,255}$")


@dataclass(frozen=True)
class Location:
    """A parsed address. ``root``: bucket, repository or claim ("" for paths). ``path``: key or path, as written.

    A repository of the Hugging Face Hub is ``org/name@revision``, one of a data set ``datasets/org/name@revision``.
    """

    scheme: Scheme
    root: str
    path: str

    def __str__(self) -> str:
        """Return the address in the form in which it was given."""
        if self.scheme == "path":
            return self.path
        if self.scheme == "file":
            return "file://" + quote(self.path, safe="/*?~+@=,:&;!$'()")
        return f"{self.scheme}://{self.root}/{self.path}"

    def at(self, path: str) -> Location:
        """Return the address of another path below the same root."""
        return Location(self.scheme, self.root, path)


def parse(uri: str) -> Location:
    """Read an address. Raises InvalidSpecError if it cannot be one of ours."""
    if not uri:
        raise InvalidSpecError("an empty address; write s3://bucket/key, pvc://claim/path or a path")
    match = _SCHEME.match(uri)
    if match is None:
        return Location("path", "", uri)
    scheme, rest = match.group(1).lower(), uri[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise InvalidSpecError(f"{uri}: a file:// address has three slashes and an absolute path: file:///{rest}")
        return Location("file", "", unquote(rest))
    root, _, path = rest.partition("/")
    if scheme == "s3":
        if not _BUCKET.match(root):
            raise InvalidSpecError(f"{uri}: {root!r} is not a bucket's name; write s3://bucket/key")
        return Location("s3", root, path)
    if scheme == "hf":
        return _on_hub(uri, rest)
    if scheme == "pvc":
        if not _CLAIM.match(root) or ".." in path.split("/"):
            raise InvalidSpecError(f"{uri}: write pvc://claim/path, with a claim's name and no '..'")
        return Location("pvc", root, path)
    raise InvalidSpecError(f"{uri}: {scheme}:// is not supported; use s3://, hf://, pvc://, file:// or a path")


def _on_hub(uri: str, rest: str) -> Location:
    found = _REPOSITORY.match(rest)
    if found is None or ".." in rest.split("/"):
        raise InvalidSpecError(f"{uri}: write hf://org/name@revision, or hf://datasets/org/name@revision/path")
    return Location("hf", found[1], (found[4] or "")[1:])


def to_path(location: Location, pvc_root: str | None = None) -> Path:
    """Return the path of a location that is neither in S3 nor on the hub.

    Raises NotFoundError if it lies on a claim that is not mounted here.
    """
    if location.scheme != "pvc":
        return Path(location.path).expanduser()
    root = pvc_root or os.environ.get("DPO_PVC_ROOT")
    if not root:
        raise NotFoundError(
            f"{location}: claims are mounted on a cluster only; here, put the claim's content in a folder "
            f"<root>/{location.root} and set DPO_PVC_ROOT=<root>"
        )
    claim = Path(root) / location.root
    if not claim.is_dir():
        raise NotFoundError(f"{location}: claim {location.root!r} is not mounted ({claim} is not a folder)")
    return claim / location.path


def is_remote(uri: str) -> bool:
    """Say whether the address is in S3 or on the hub (and not a path, a file or a mounted claim)."""
    return parse(uri).scheme in REMOTE


def local_path_of(uri: str, pvc_root: str | None = None) -> Path | None:
    """Return the path behind an address, or None if it is remote."""
    location = parse(uri)
    return None if location.scheme in REMOTE else to_path(location, pvc_root)


def join_uri(folder: str, name: str, *more: str) -> str:
    """Return the address of the names below a folder, whether or not the folder's address ends with ``/``.

    >>> join_uri("s3://b/runs", "step-000100", "weights.bin")
    's3://b/runs/step-000100/weights.bin'
    """
    location = parse(folder)
    names = [name, *more]
    base = location.path
    if base and not base.endswith("/"):
        base += "/"
    return str(location.at(base + "/".join([*(n.strip("/") for n in names[:-1]), names[-1].lstrip("/")])))


def base_name(uri: str) -> str:
    """Return the last part of the address: ``train.jsonl`` of ``s3://b/x/train.jsonl``."""
    location = parse(uri)
    return location.path.rstrip("/").rpartition("/")[2] or location.root


def as_folder(location: Location) -> Location:
    """Return the location with ``/`` at the end of its path; a bucket's or claim's root stays empty."""
    path = location.path
    if path and not path.endswith("/"):
        path += "/"
    return location.at(path)
