"""One table of a policy file: every key is read once, by its kind; what is missing, unknown or of another kind refuses.

Errors say the table, the key and, where it can be found, the line.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from client.attestation.rules import AllowList
from wire.errors import InvalidArgumentError

UNCHECKED = "unchecked"
MAX_ENTRIES = 1024  # of one list
_MISSING = object()
_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]")


class PolicyError(InvalidArgumentError):
    """A policy file that is not accepted: where, what is wrong, and what would be right."""


class Table:
    """A table, named as in the file: `` for the top, `sev-snp`, `sev-snp.min_tcb`."""

    def __init__(self, name: str, values: object, text: str, file: str) -> None:
        self._name = name
        self._text = text
        self._file = PurePath(file).name
        if not isinstance(values, Mapping):
            raise self.error("", "must be a table")
        self._left: dict[str, Any] = dict(values)

    def error(self, key: str, reason: str) -> PolicyError:
        """A PolicyError about a key of this table, to be raised."""
        line = _line_of(self._text, self._name, key)
        where = ".".join(part for part in (self._name, key) if part)
        return PolicyError(f"{self._file}{f', line {line}' if line else ''}: {where} {reason}")

    def table(self, key: str) -> "Table":
        """A table in this one."""
        name = f"{self._name}.{key}" if self._name else key
        if key not in self._left:
            raise self.error(key, "is missing: a policy file spells every table that it needs")
        return Table(name, self._left.pop(key), self._text, self._file)

    def has(self, key: str) -> bool:
        """Whether the key is there and was not read yet."""
        return key in self._left

    def done(self) -> None:
        """Refuse what was not read."""
        for key in self._left:
            raise self.error(key, "is not known here: remove it, or look for a misspelling")

    def truth(self, key: str) -> bool:
        """True or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def number(self, key: str, low: int, high: int) -> int:
        """A whole number within bounds, both included."""
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be a whole number from {low} to {high}")
        return value

    def text(self, key: str, pattern: str, meaning: str) -> str:
        """A string of a form."""
        value = self._take(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.error(key, f"must be {meaning}")
        return value

    def hexadecimal(self, key: str, size: int) -> str:
        """A string of `size` bytes."""
        return self.text(key, f"[0-9a-f]{{{2 * size}}}", f"{size} bytes as {2 * size} lower-case hexadecimal digits")

    def choices(self, key: str, allowed: Iterable[str]) -> frozenset[str]:
        """A list of some of the allowed words; not empty."""
        allowed = tuple(allowed)
        found = self._strings(key, "|".join(map(re.escape, allowed)), f"one of {', '.join(allowed)}")
        if not found:
            raise self.error(key, "is empty, which would refuse everything: name what you accept")
        return found

    def words(self, key: str, pattern: str, meaning: str) -> frozenset[str]:
        """A list of strings of a form; may be empty."""
        return self._strings(key, pattern, meaning)

    def allow_list(self, key: str, pattern: str, meaning: str, may_be_unchecked: bool = True) -> AllowList:
        """A list that is not empty, or the word "unchecked" where that is offered."""
        if may_be_unchecked and self._left.get(key) == UNCHECKED:
            del self._left[key]
            return AllowList(unchecked=True)
        found = self._strings(key, pattern, meaning)
        if not found:
            way_out = f'; "{UNCHECKED}" leaves it unchecked' if may_be_unchecked else ""
            raise self.error(key, f"is empty, which would refuse everything: list what you accept{way_out}")
        return AllowList(found)

    def digests(self, key: str, size: int, may_be_unchecked: bool = True) -> AllowList:
        """An allow-list of byte strings of `size` bytes."""
        meaning = f"{size} bytes as {2 * size} lower-case hexadecimal digits"
        return self.allow_list(key, f"[0-9a-f]{{{2 * size}}}", meaning, may_be_unchecked)

    def _strings(self, key: str, pattern: str, meaning: str) -> frozenset[str]:
        value = self._take(key)
        if not isinstance(value, list):
            raise self.error(key, f"must be a list; each entry {meaning}")
        if len(value) > MAX_ENTRIES:
            raise self.error(key, f"has more than {MAX_ENTRIES} entries")
        for one in value:
            if not isinstance(one, str) or not re.fullmatch(pattern, one):
                raise self.error(key, f"has an entry {str(one)[:24]!r}: each must be {meaning}")
        return frozenset(value)

    def _take(self, key: str) -> Any:
        value = self._left.pop(key, _MISSING)
        if value is _MISSING:
            raise self.error(key, "is missing: a policy file spells every field")
        return value


def _line_of(text: str, table: str, key: str) -> int | None:
    """The line of a key, else that of its table's header; None where neither is written in the plain form."""
    inside, header = not table, None
    for number, line in enumerate(text.splitlines(), 1):
        if found := _HEADER.match(line):
            name = found[1].replace('"', "")
            inside = name == table
            header = number if inside or name == f"{table}.{key}".strip(".") else header
        elif inside and key and re.match(rf'\s*"?{re.escape(key)}"?\s*=', line):
            return number
    return header
