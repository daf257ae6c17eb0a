"""The table of foreign codes, and what each real exception of the client library means."""

from __future__ import annotations

import errno
import os
import ssl

import pytest
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.exceptions import ClientError

from dpo_api.errors import (
    AccessDeniedError,
    DPOError,
    InvalidSpecError,
    NoSpaceError,
    NotFoundError,
    Outcome,
    StorageUnavailableError,
)
from dpo_store import ObjectChangedError, RetryPolicy, StorageOptions, Timing
from dpo_store.errors import CODES, EXCEPTIONS, BadCredentialsError, from_os_error
from dpo_store.s3 import S3Backend

BACKEND = S3Backend(StorageOptions(), RetryPolicy(), Timing())


def client_error(code: str, status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "GetObject",
    )


@pytest.mark.parametrize(
    ("code", "status", "error", "retry"),
    [
        ("NoSuchBucket", 404, NotFoundError, False),
        ("404", 404, NotFoundError, False),
        ("AccessDenied", 403, AccessDeniedError, False),
        ("403", 403, AccessDeniedError, False),
        ("InvalidAccessKeyId", 403, AccessDeniedError, False),
        ("ExpiredToken", 400, AccessDeniedError, False),
        ("PermanentRedirect", 301, InvalidSpecError, False),
        ("AuthorizationHeaderMalformed", 400, InvalidSpecError, False),
        ("PreconditionFailed", 412, ObjectChangedError, False),
        ("InvalidRange", 416, ObjectChangedError, False),
        ("QuotaExceeded", 403, NoSpaceError, False),
        ("SlowDown", 503, StorageUnavailableError, True),
        ("RequestTimeout", 400, StorageUnavailableError, True),
        ("NeverHeardOf", 503, StorageUnavailableError, True),
        ("500", 500, StorageUnavailableError, True),
        ("NeverHeardOf", 400, StorageUnavailableError, False),
    ],
)
def test_codes(code: str, status: int, error: type[DPOError], retry: bool) -> None:
    found = BACKEND._explain(client_error(code, status))
    assert found is not None
    assert issubclass(found[0].error, error)
    assert found[0].retry is retry
    if error is AccessDeniedError and "Denied" not in code and code != "403":
        assert found[0].error is BadCredentialsError


ENDPOINT = {"endpoint_url": "http://user:hunter2@127.0.0.1:1/"}


@pytest.mark.parametrize(
    ("raised", "error", "retry"),
    [
        (boto.NoCredentialsError(), AccessDeniedError, False),
        (boto.CredentialRetrievalError(provider="p", error_msg="hunter2"), AccessDeniedError, False),
        (boto.ProfileNotFound(profile="p"), AccessDeniedError, False),
        (boto.SSOTokenLoadError(error_msg="m"), AccessDeniedError, False),
        (boto.NoRegionError(), InvalidSpecError, False),
        (boto.ParamValidationError(report="r"), InvalidSpecError, False),
        (boto.EndpointConnectionError(error="hunter2", **ENDPOINT), StorageUnavailableError, True),
        (boto.ConnectTimeoutError(error="e", **ENDPOINT), StorageUnavailableError, True),
        (boto.ReadTimeoutError(error="e", **ENDPOINT), StorageUnavailableError, True),
        (boto.ConnectionClosedError(error="e", **ENDPOINT), StorageUnavailableError, True),
        (boto.ProxyConnectionError(error="e", proxy_url="http://user:hunter2@p"), StorageUnavailableError, True),
        (boto.SSLError(error=ssl.SSLError("UNEXPECTED_EOF_WHILE_READING"), **ENDPOINT), StorageUnavailableError, True),
        (boto.SSLError(error=ssl.SSLError("CERTIFICATE_VERIFY_FAILED"), **ENDPOINT), StorageUnavailableError, False),
        (boto.HTTPClientError(error="e"), StorageUnavailableError, True),
        (boto.ResponseStreamingError(error="e"), StorageUnavailableError, True),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), StorageUnavailableError, True),
        (urllib3.exceptions.ProtocolError("broken"), StorageUnavailableError, True),
        (urllib3.exceptions.ReadTimeoutError(None, "u", "m"), StorageUnavailableError, True),  # type: ignore[arg-type]
        (ConnectionResetError(), StorageUnavailableError, True),
        (ssl.SSLError("record layer failure"), StorageUnavailableError, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exceptions(raised: Exception, error: type[DPOError], retry: bool) -> None:
    found = BACKEND._explain(raised)
    assert found is not None
    assert (found[0].error, found[0].retry) == (error, retry)
    assert "hunter2" not in found[1]


def test_our_own_mistakes_are_not_explained_away() -> None:
    assert BACKEND._explain(KeyError("x")) is None


def test_only_what_another_attempt_may_mend_is_tried_again() -> None:
    for rule in [*CODES.values(), *EXCEPTIONS.values()]:
        assert not rule.retry or rule.error.outcome is Outcome.StorageUnavailable


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOENT, NotFoundError),
        (errno.EACCES, AccessDeniedError),
        (errno.EROFS, AccessDeniedError),
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EIO, StorageUnavailableError),
        (errno.ESTALE, StorageUnavailableError),
    ],
)
def test_error_numbers(number: int, error: type[DPOError]) -> None:
    found = from_os_error(OSError(number, os.strerror(number)), "x/y")
    assert type(found) is error
    assert str(found).startswith("x/y: ")
