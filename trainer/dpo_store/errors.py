"""The one table from foreign error codes to our typed errors, and whether each is worth another try."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from dpo_api.errors import (
    AccessDeniedError,
    DPOError,
    InvalidDataError,
    InvalidSpecError,
    NoSpaceError,
    NotFoundError,
    StorageUnavailableError,
)


class ObjectChangedError(InvalidDataError):
    """The object is no longer the one that was listed: it was overwritten, truncated or deleted during the read."""


class BadCredentialsError(AccessDeniedError):
    """The storage does not accept the credentials at all, whatever they ask for."""


@dataclass(frozen=True)
class Rule:
    """What one foreign error means: our class, whether to try again, and the sentence after the address."""

    error: type[DPOError]
    retry: bool
    text: str


_DENIED: Final = "access denied; the credentials may not do this, or the object does not exist and may not be listed"
_KEYS: Final = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile or role in use)"
_REGION: Final = "the bucket is in another region; set storage.region"
_CHANGED: Final = "changed while it was being read; stop writing to it, or give the run a copy"
_BUSY: Final = "the storage is overloaded or failing"
_CLOCK: Final = "this machine's clock differs from the storage's"
_FULL: Final = "the storage is full or over its quota"

_bad = {
    code: Rule(BadCredentialsError, retry=False, text=f"{text}; {_KEYS}")
    for code, text in {
        "InvalidAccessKeyId": "the storage does not know this access key",
        "SignatureDoesNotMatch": "the storage rejects the signature: the secret key is wrong",
        "InvalidToken": "the storage rejects the session token",
        "XAdminUserNotFound": "the storage does not know this access key",  # versitygw
        "InvalidClientTokenId": "the storage does not know this access key",
        "UnrecognizedClientException": "the storage does not know this access key",
        "ExpiredToken": "the credentials have expired",
        "ExpiredTokenException": "the credentials have expired",
        "TokenRefreshRequired": "the credentials have expired",
        "InvalidSecurity": "the storage rejects the credentials",
        "AuthFailure": "the storage rejects the credentials",
    }.items()
}

CODES: Final[dict[str, Rule]] = {
    **_bad,
    # -- absent
    "NoSuchKey": Rule(NotFoundError, retry=False, text="does not exist"),
    "NotFound": Rule(NotFoundError, retry=False, text="does not exist"),
    "404": Rule(NotFoundError, retry=False, text="does not exist"),
    "NoSuchBucket": Rule(NotFoundError, retry=False, text="the bucket does not exist"),
    "NoSuchVersion": Rule(NotFoundError, retry=False, text="does not exist"),
    # -- refused
    "AccessDenied": Rule(AccessDeniedError, retry=False, text=_DENIED),
    "AllAccessDisabled": Rule(AccessDeniedError, retry=False, text=_DENIED),
    "AccountProblem": Rule(AccessDeniedError, retry=False, text=_DENIED),
    "401": Rule(AccessDeniedError, retry=False, text=_DENIED),
    "403": Rule(AccessDeniedError, retry=False, text=_DENIED),
    "RequestTimeTooSkewed": Rule(AccessDeniedError, retry=False, text=_CLOCK),
    "InvalidObjectState": Rule(AccessDeniedError, retry=False, text="is archived; restore it first"),
    # -- another region
    "PermanentRedirect": Rule(InvalidSpecError, retry=False, text=_REGION),
    "301": Rule(InvalidSpecError, retry=False, text=_REGION),
    "AuthorizationHeaderMalformed": Rule(InvalidSpecError, retry=False, text=_REGION),
    "IllegalLocationConstraintException": Rule(InvalidSpecError, retry=False, text=_REGION),
    # -- impossible requests
    "InvalidBucketName": Rule(InvalidSpecError, retry=False, text="this is not a valid bucket name"),
    "KeyTooLongError": Rule(InvalidSpecError, retry=False, text="the key is too long"),
    "NotImplemented": Rule(InvalidSpecError, retry=False, text="the storage does not implement this request"),
    "501": Rule(InvalidSpecError, retry=False, text="the storage does not implement this request"),
    "MethodNotAllowed": Rule(InvalidSpecError, retry=False, text="the storage does not allow this request"),
    "405": Rule(InvalidSpecError, retry=False, text="the storage does not allow this request; is it an S3 endpoint?"),
    # -- changed under us
    "PreconditionFailed": Rule(ObjectChangedError, retry=False, text=_CHANGED),
    "412": Rule(ObjectChangedError, retry=False, text=_CHANGED),
    "InvalidRange": Rule(ObjectChangedError, retry=False, text=_CHANGED),
    "416": Rule(ObjectChangedError, retry=False, text=_CHANGED),
    # -- full
    "QuotaExceeded": Rule(NoSpaceError, retry=False, text=_FULL),
    "XMinioStorageFull": Rule(NoSpaceError, retry=False, text=_FULL),
    "XMinioAdminBucketQuotaExceeded": Rule(NoSpaceError, retry=False, text=_FULL),
    "EntityTooLarge": Rule(NoSpaceError, retry=False, text="the object is larger than the storage allows"),
    "507": Rule(NoSpaceError, retry=False, text=_FULL),
    # -- passing
    "SlowDown": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "Throttling": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "ThrottlingException": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "RequestLimitExceeded": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "TooManyRequests": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "RequestTimeout": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "InternalError": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "ServiceUnavailable": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "OperationAborted": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    "TemporaryRedirect": Rule(StorageUnavailableError, retry=True, text=_BUSY),
    # The body was damaged on its way: the storage compared it with our Content-MD5.
    "BadDigest": Rule(StorageUnavailableError, retry=True, text="the data arrived damaged"),
    "IncompleteBody": Rule(StorageUnavailableError, retry=True, text="the data arrived incomplete"),
}

PASSING_STATUS: Final = frozenset({307, 408, 425, 429, 500, 502, 503, 504, 509, 520, 522, 524, 529})
"""HTTP statuses that mean "later", for codes that are not in the table."""

EXCEPTIONS: Final[dict[str, Rule]] = {
    # botocore's classes by name, so that this module needs no boto3; a subclass finds its nearest base's row.
    "NoCredentialsError": Rule(
        AccessDeniedError,
        retry=False,
        text="no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use a role",
    ),
    "PartialCredentialsError": Rule(
        AccessDeniedError, retry=False, text="half of the S3 credentials is missing; set both key and secret"
    ),
    "CredentialRetrievalError": Rule(AccessDeniedError, retry=False, text="the S3 credentials could not be fetched"),
    "ProfileNotFound": Rule(AccessDeniedError, retry=False, text="AWS_PROFILE names a profile that does not exist"),
    "ConfigParseError": Rule(AccessDeniedError, retry=False, text="the AWS configuration file cannot be read"),
    "SSOError": Rule(AccessDeniedError, retry=False, text="the single sign-on session has expired; log in again"),
    "TokenRetrievalError": Rule(AccessDeniedError, retry=False, text="the sign-on token could not be fetched"),
    "NoRegionError": Rule(InvalidSpecError, retry=False, text="no region; set storage.region"),
    "InvalidRegionError": Rule(InvalidSpecError, retry=False, text="storage.region is not a region's name"),
    "ParamValidationError": Rule(InvalidSpecError, retry=False, text="this is not a valid bucket or key"),
    "SSLError": Rule(StorageUnavailableError, retry=True, text="the encrypted connection to the storage failed"),
    "ConnectTimeoutError": Rule(StorageUnavailableError, retry=True, text="no connection to the storage"),
    "EndpointConnectionError": Rule(
        StorageUnavailableError, retry=True, text="no connection to the storage; check storage.endpoint"
    ),
    "ProxyConnectionError": Rule(StorageUnavailableError, retry=True, text="no connection to the proxy"),
    "ReadTimeoutError": Rule(StorageUnavailableError, retry=True, text="the storage stopped answering"),
    "ConnectionClosedError": Rule(StorageUnavailableError, retry=True, text="the storage closed the connection"),
    "HTTPClientError": Rule(StorageUnavailableError, retry=True, text="the connection to the storage failed"),
    "HTTPError": Rule(StorageUnavailableError, retry=True, text="the connection to the storage failed"),  # urllib3's
    "IncompleteReadError": Rule(StorageUnavailableError, retry=True, text="the answer was cut short"),
    "ResponseParserError": Rule(
        StorageUnavailableError, retry=True, text="the answer is not S3's; check storage.endpoint"
    ),
    "ConnectionError": Rule(StorageUnavailableError, retry=True, text="the connection to the storage failed"),
    "TimeoutError": Rule(StorageUnavailableError, retry=True, text="the storage stopped answering"),
}

ERRNOS: Final[dict[int, Rule]] = {
    errno.ENOENT: Rule(NotFoundError, retry=False, text="does not exist"),
    errno.ENOTDIR: Rule(NotFoundError, retry=False, text="does not exist (a part of its path is a file)"),
    errno.EISDIR: Rule(NotFoundError, retry=False, text="is a folder, not a file"),
    errno.EACCES: Rule(AccessDeniedError, retry=False, text="permission denied"),
    errno.EPERM: Rule(AccessDeniedError, retry=False, text="permission denied"),
    errno.EROFS: Rule(AccessDeniedError, retry=False, text="is on a read-only file system"),
    errno.ENOSPC: Rule(NoSpaceError, retry=False, text="no space left on the disk"),
    errno.EDQUOT: Rule(NoSpaceError, retry=False, text="the disk quota is used up"),
    errno.EFBIG: Rule(NoSpaceError, retry=False, text="the file is larger than the file system or the limit allows"),
    errno.ENAMETOOLONG: Rule(InvalidSpecError, retry=False, text="the name is too long"),
    errno.ELOOP: Rule(InvalidSpecError, retry=False, text="its symbolic links go round in a circle"),
}

_UNTRUSTED: Final = Rule(
    StorageUnavailableError, retry=False, text="the storage's certificate is not trusted; set storage.caBundle"
)
_UNKNOWN_OS: Final = "the disk failed"


def rule_of_code(code: str, status: int) -> Rule:
    """Return the meaning of an S3 error code and HTTP status; unknown ones by their status."""
    known = CODES.get(code)
    if known is not None:
        return known
    passing = status in PASSING_STATUS or (code.isdigit() and int(code) in PASSING_STATUS)
    return Rule(StorageUnavailableError, retry=passing, text=_BUSY if passing else "the storage refuses the request")


def rule_of_exception(error: BaseException) -> Rule | None:
    """Return the meaning of a client library's exception, or None if it is not about storage."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return _UNTRUSTED
    for cls in type(error).__mro__:
        rule = EXCEPTIONS.get(cls.__name__)
        if rule is not None:
            return rule
    return None


def from_os_error(error: OSError, uri: str) -> DPOError:
    """Turn a file system's error into ours."""
    rule = ERRNOS.get(error.errno or 0, Rule(StorageUnavailableError, retry=False, text=_UNKNOWN_OS))
    detail = f" ({error.strerror})" if rule.text == _UNKNOWN_OS and error.strerror else ""
    return rule.error(f"{uri}: {rule.text}{detail}")
