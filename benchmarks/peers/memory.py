"""The memory of this process, for benchmarks whose parts are processes of their own."""

import re
from pathlib import Path


def status(field: str) -> int:
    """A field of /proc/self/status in bytes. VmHWM is the peak; unlike ru_maxrss, it is not the parent's."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
