"""Every reason that a status or an event can name. docs/operations.md prints the table."""

from dpo_operator.reasons.row import TOPICS, WEAK, Row
from dpo_operator.reasons.table import Reason, named, of_outcome

__all__ = ["TOPICS", "WEAK", "Reason", "Row", "named", "of_outcome"]
