"""What files over ranges of an object share: a position that can be set and read."""

from __future__ import annotations

import io


class Seekable(io.IOBase):
    """The position in a file of ``size`` bytes. A subclass has the ``read``, which moves ``at``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position. Raises ValueError for one before the beginning."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if at < 0:
            raise ValueError("it refers to bytes before its beginning")
        self.at = at
        return at

    def given(self, size: int | None) -> int:
        """Return how many bytes a read of ``size`` gives; None or a negative number asks for all that are left."""
        left = max(0, self.size - self.at)
        return left if size is None or size < 0 else min(size, left)
