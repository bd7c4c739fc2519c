"""Bytes that may still be taken of something that all streams share. Only the compute thread comes here."""

from wire.errors import ExhaustedError


class Allowance:
    """At most `limit` bytes of `what`. The limit may change; what was taken stays taken until it is given back."""

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Raises ExhaustedError when `size` bytes are not left."""
        left = max(0, self.limit - self.used)
        if size > left:
            raise ExhaustedError(f"{self._what} of {size} bytes was asked for; {left} bytes would fit")
        self.used += size

    def give(self, size: int) -> None:
        """Bytes that were taken are free again."""
        self.used -= size
