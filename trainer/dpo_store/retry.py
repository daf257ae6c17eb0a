"""Trying again: jittered exponential back-off, counted in failures without progress."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dpo_api.errors import DPOError, StorageUnavailableError
from dpo_store.errors import Rule, rule_of_exception
from dpo_store.options import RetryPolicy, Timing

log = logging.getLogger("dpo_store")


class PassingError(Exception):
    """An answer that was wrong in a way that another request may fix: short, slow, or of another range."""


class Patience:
    """The count of failures of one operation.

    ``failed`` either waits, and then the caller tries again, or raises the error that ends the operation;
    ``progressed`` forgets the failures so far.
    """

    def __init__(
        self,
        subject: str,
        policy: RetryPolicy,
        timing: Timing,
        explain: Callable[[BaseException], tuple[Rule, str] | None],
    ) -> None:
        self._subject = subject
        self._policy = policy
        self._timing = timing
        self._explain = explain
        self.failures = 0

    def progressed(self) -> None:
        """Reset the count: the operation has made progress."""
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next try, or raise: our error if ``error`` is permanent or was one too many."""
        if isinstance(error, DPOError):
            raise error
        found = self._explain(error)
        if found is None:
            raise error
        rule, text = found
        if not rule.retry:
            raise rule.error(f"{self._subject}: {text}") from error
        self.failures += 1
        if self.failures >= self._policy.attempts:
            raise rule.error(f"{self._subject}: {text} (gave up after {self.failures} tries)") from error
        pause = self._timing.random() * min(self._policy.cap, self._policy.base * 2.0**self.failures)
        tries = f"try {self.failures + 1} of {self._policy.attempts}"
        log.warning("%s: %s; %s in %.1f s", self._subject, text, tries, pause)
        self._timing.sleep(pause)

    def run[T](self, attempt: Callable[[], T]) -> T:
        """Call ``attempt`` until it returns or fails for good."""
        while True:
            try:
                return attempt()
            except Exception as error:  # noqa: BLE001 (`failed` raises what is not passing)
                self.failed(error)


def explain(error: BaseException) -> tuple[Rule, str] | None:
    """Return what an exception of the client library means, for operations without their own codes."""
    if isinstance(error, PassingError):
        return Rule(StorageUnavailableError, retry=True, text=str(error)), str(error)
    rule = rule_of_exception(error)
    return None if rule is None else (rule, rule.text)
