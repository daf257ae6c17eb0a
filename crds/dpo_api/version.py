"""The version of this software. A trainer reads every spec of the same or an earlier version."""

VERSION = "0.2.0"
