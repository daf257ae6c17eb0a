"""How a run can end: one table of outcomes, their exit codes, and the typed errors that lead to them.

The trainer exits with an outcome's code and names it in its termination message. The operator reads the message to
decide whether another attempt can help. The CLI exits with the same code. Errors are mapped to codes only here.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Literal, Self

Retry = Literal["none", "permanent", "retryable", "infrastructure"]
"""What another attempt could change.

``none``: nothing to retry. ``permanent``: the same spec fails again, never retried. ``retryable``: may pass next
time, counted against ``runPolicy.maxRestarts``. ``infrastructure``: caused by the machine, not by the job.
"""


class Outcome(Enum):
    """One way for a run to end. Termination messages and the status carry its name, which is also its value."""

    exit_code: int
    retry: Retry
    description: str

    def __new__(cls, name: str, exit_code: int, retry: Retry, description: str) -> Self:
        """Create the member with the value ``name``; the other columns become its attributes."""
        member = object.__new__(cls)
        member._value_ = name
        member.exit_code = exit_code
        member.retry = retry
        member.description = description
        return member

    Succeeded = "Succeeded", 0, "none", "The run finished and its model was exported."
    Internal = "Internal", 1, "retryable", "An unexpected error; the log holds its traceback."
    InvalidSpec = "InvalidSpec", 2, "permanent", "The manifest asks for something impossible or not implemented."
    InvalidData = "InvalidData", 3, "permanent", "The preference data cannot be used as the manifest says."
    InvalidModel = (
        "InvalidModel",
        4,
        "permanent",
        "The files of the model or tokenizer are damaged, not supported or inconsistent.",
    )
    NonFinite = "NonFinite", 5, "permanent", "A loss or a gradient became NaN or infinite."
    OutOfMemory = "OutOfMemory", 6, "permanent", "The accelerator or the machine ran out of memory."
    NoSpace = "NoSpace", 7, "permanent", "A disk or a quota is full."
    IncompatibleCheckpoint = (
        "IncompatibleCheckpoint",
        8,
        "permanent",
        "The run directory holds a checkpoint of another model, data set or spec.",
    )
    Fenced = "Fenced", 9, "permanent", "A later attempt owns the run directory; this one must not write to it."
    AccessDenied = "AccessDenied", 10, "permanent", "Storage or another service refused the credentials."
    NotFound = (
        "NotFound",
        11,
        "permanent",
        "A file, object, bucket, volume or model that the manifest names does not exist.",
    )
    PortInUse = "PortInUse", 12, "permanent", "Another process uses the metrics or rendezvous port."
    WrongLayout = (
        "WrongLayout",
        13,
        "permanent",
        "A layout that divides the model does not compute what one process does.",
    )
    Usage = "Usage", 64, "permanent", "The command line is not valid."
    StorageUnavailable = (
        "StorageUnavailable",
        74,
        "retryable",
        "Storage did not respond, or failed after all retries.",
    )
    Communication = (
        "Communication",
        75,
        "retryable",
        "The processes lost contact with each other (NCCL, Gloo, rendezvous).",
    )
    LayoutTooLarge = (
        "LayoutTooLarge",
        76,
        "infrastructure",
        "The accelerator ran out of memory in a layout that was chosen; the next attempt uses the runner-up.",
    )
    DeviceFailed = "DeviceFailed", 77, "infrastructure", "A GPU, its links or its driver failed."
    Stopped = "Stopped", 143, "infrastructure", "The run was asked to stop. It wrote a checkpoint and can be continued."

    @classmethod
    def of_exit_code(cls, code: int) -> Outcome | None:
        """Return the outcome with this exit code, or None if no outcome has it (137, 139, ...)."""
        return next((outcome for outcome in cls if outcome.exit_code == code), None)

    @property
    def error(self) -> type[DPOError]:
        """The class of the errors that end a run this way; KeyError for Succeeded."""
        return _CLASSES[self]


class DPOError(Exception):
    """A failure with a known outcome. Its message is one plain sentence for the person who wrote the manifest."""

    outcome: ClassVar[Outcome] = Outcome.Internal

    @property
    def exit_code(self) -> int:
        """The exit code of this error's outcome."""
        return self.outcome.exit_code


class InternalError(DPOError):
    """See Outcome.Internal."""

    outcome = Outcome.Internal


class InvalidSpecError(DPOError):
    """See Outcome.InvalidSpec."""

    outcome = Outcome.InvalidSpec


class InvalidDataError(DPOError):
    """See Outcome.InvalidData."""

    outcome = Outcome.InvalidData


class InvalidModelError(DPOError):
    """See Outcome.InvalidModel."""

    outcome = Outcome.InvalidModel


class NonFiniteError(DPOError):
    """See Outcome.NonFinite."""

    outcome = Outcome.NonFinite


class OutOfMemoryError(DPOError):
    """See Outcome.OutOfMemory. Not torch's class of that name: catch torch's and raise this."""

    outcome = Outcome.OutOfMemory


class NoSpaceError(DPOError):
    """See Outcome.NoSpace."""

    outcome = Outcome.NoSpace


class IncompatibleCheckpointError(DPOError):
    """See Outcome.IncompatibleCheckpoint."""

    outcome = Outcome.IncompatibleCheckpoint


class FencedError(DPOError):
    """See Outcome.Fenced."""

    outcome = Outcome.Fenced


class AccessDeniedError(DPOError):
    """See Outcome.AccessDenied."""

    outcome = Outcome.AccessDenied


class NotFoundError(DPOError):
    """See Outcome.NotFound."""

    outcome = Outcome.NotFound


class PortInUseError(DPOError):
    """See Outcome.PortInUse."""

    outcome = Outcome.PortInUse


class WrongLayoutError(DPOError):
    """See Outcome.WrongLayout."""

    outcome = Outcome.WrongLayout


class UsageError(DPOError):
    """See Outcome.Usage."""

    outcome = Outcome.Usage


class StorageUnavailableError(DPOError):
    """See Outcome.StorageUnavailable."""

    outcome = Outcome.StorageUnavailable


class CommunicationError(DPOError):
    """See Outcome.Communication."""

    outcome = Outcome.Communication


class LayoutTooLargeError(DPOError):
    """See Outcome.LayoutTooLarge."""

    outcome = Outcome.LayoutTooLarge


class DeviceFailedError(DPOError):
    """See Outcome.DeviceFailed."""

    outcome = Outcome.DeviceFailed


class StoppedError(DPOError):
    """See Outcome.Stopped."""

    outcome = Outcome.Stopped


_CLASSES = {error.outcome: error for error in DPOError.__subclasses__()}
"""One class for each outcome except Succeeded. dpo_store's subclasses of these classes are not included."""
