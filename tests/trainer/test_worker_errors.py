"""What a worker makes of errors that nobody raised on purpose."""

import errno

import pytest
import torch

from dpo_api.errors import InvalidDataError, Outcome
from dpo_trainer.worker import explain


@pytest.mark.parametrize(
    ("error", "outcome", "expected"),
    [
        (InvalidDataError("a sentence"), Outcome.InvalidData, "a sentence"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/m"),
            Outcome.NoSpace,
            "/run/m: No space left on device",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            Outcome.NoSpace,
            "of the cache (DPO_CACHE_DIR) or of TMPDIR: ",
        ),
        (OSError(errno.EFBIG, "File too large", "/run/m"), Outcome.NoSpace, "/run/m: File too large"),
        (OSError(errno.EROFS, "Read-only file system", "/run"), Outcome.AccessDenied, "/run: Read-only file system"),
        (torch.OutOfMemoryError("no 2 GiB"), Outcome.OutOfMemory, "Lower training.packing.maxTokens"),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), Outcome.Communication, "lost contact"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/bug"), Outcome.Internal, "FileNotFoundError"),
        (RuntimeError("first\nsecond"), Outcome.Internal, "RuntimeError: first"),
    ],
)
def test_each_error_has_an_outcome_and_a_sentence(error: BaseException, outcome: Outcome, expected: str) -> None:
    found, message = explain(error)
    assert found is outcome
    assert expected in message
    assert "\n" not in message
