"""Reading the fields of a JSON object, strictly: each is taken once, by name, and what is left over is refused.

null is as good as absent, everywhere: clients send it for what they do not set.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from client.gateway.errors import refused

T = TypeVar("T")
D = TypeVar("D")
UNSUPPORTED = "unsupported_parameter"


class Fields:
    """An object's fields. `path` is where it stands in the request, for errors, which are all ApiError."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise refused(path or "body", "must be a JSON object")
        self._values, self._path = dict(value), path

    def name(self, field: str) -> str:
        """The whole name of a field, as valid Unicode, whatever a client calls it."""
        name = f"{self._path}.{field}" if self._path else field
        return name.encode("utf-8", "replace").decode()

    def take(self, field: str, read: Callable[[Any], T], default: D) -> T | D:
        """The field, read; the default for null and for none. A reader raises ValueError, which says what it wants."""
        value = self._values.pop(field, None)
        return default if value is None else self._read(field, read, value)

    def need(self, field: str, read: Callable[[Any], T]) -> T:
        """The same of a field that must be there."""
        value = self._values.pop(field, None)
        if value is None:
            raise refused(self.name(field), "is missing", "missing_required_parameter")
        return self._read(field, read, value)

    def finish(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Refuse what is left over, unless it has one of the values that change nothing."""
        for field, value in self._values.items():
            if value is None or any(_same(value, one) for one in neutral.get(field, ())):
                continue
            values = " or ".join(json.dumps(one) for one in neutral.get(field, ()))
            told = f"only {values} is supported here, which changes nothing" if values else "is not supported here"
            raise refused(self.name(field), f"{told}: leave it out", UNSUPPORTED)

    def _read(self, field: str, read: Callable[[Any], T], value: Any) -> T:
        try:
            return read(value)
        except ValueError as error:
            raise refused(self.name(field), str(error)) from None


def _same(value: Any, other: Any) -> bool:
    """Equal, and no truth value taken for a number."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def integer(low: int, high: int) -> Callable[[Any], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Callable[[Any], float]:
    """A reader of numbers from `low` to `high`."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")  # NaN is in no range
        return float(value)

    return read


def truth(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: Any) -> str:
    """A string that can be written as UTF-8: JSON also spells half surrogates."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return value
