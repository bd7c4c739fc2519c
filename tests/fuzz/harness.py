"""What every target has in common: entries in, outcomes out, and what counts as a bug.

An entry is one letter, which says what it is, and the bytes of it. A target is deterministic: the same entries from
`begin` on give the same outcomes, so a list of them is a reproducer.
"""

import hashlib
import re
import signal
import struct
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from wire.errors import CleaveError

EPISODE = 64  # entries between two fresh starts
CHECK_EVERY = 500  # malformed frames between two valid calls that must be answered as ever
HANG_SECONDS = 30
SAMPLED = 0.01  # share of the entries whose allocations are traced
ALLOWED_BYTES, ALLOWED_FACTOR = 2 << 20, 100  # Python and numpy memory on behalf of one entry: so much, and x its bytes

KNOWN: dict[str, str] = {}  # bugs that are reported and not fixed yet, and what they are called. Empty is best


class Target(Protocol):
    """Something that takes hostile input."""

    name: str

    def begin(self) -> None:
        """A fresh start: no stream, no session."""
        ...

    def next(self, random: Random) -> tuple[bytes, int]:
        """An entry, and how many malformed frames it holds (0: it only prepares the ground)."""
        ...

    def play(self, entry: bytes) -> str:
        """Feed it. What came of it in a word; a CleaveError is fine; anything else that it raises is a bug."""
        ...

    def end(self) -> None:
        """The episode is over: whatever it took must be given back. Raises Bug."""
        ...

    def check(self) -> None:
        """A valid call is answered as it was at the start. Raises Bug."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class Bug(Exception):  # noqa: N818  (it is what is looked for)
    """An outcome that must not be. `signature` tells bugs apart."""

    def __init__(self, signature: str) -> None:
        super().__init__(signature)
        self.signature = signature


@dataclass
class Result:
    """What a run saw."""

    frames: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    bugs: dict[str, list[bytes]] = field(default_factory=dict)
    seeds: dict[tuple[str, str], list[bytes]] = field(default_factory=dict)  # one reproducer for each outcome and text
    worst_factor: float = 0.0  # traced bytes over an entry's own


def attempt(target: Target, entry: bytes) -> tuple[str, str]:
    """Outcome and its text. Raises Bug."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        return target.play(entry), ""
    except CleaveError as error:
        if type(error) is CleaveError or "internal error" in str(error):
            raise Bug(_signature(error)) from error
        return type(error).__name__, re.sub(r"'.*'|[0-9]+", "#", str(error))
    except Bug as bug:
        if bug.signature in KNOWN:
            return f"known: {KNOWN[bug.signature]}", ""
        raise
    except Exception as error:
        signature = _signature(error)
        if signature in KNOWN:
            return f"known: {KNOWN[signature]}", ""
        raise Bug(signature) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def traced(target: Target, entry: bytes, result: Result) -> tuple[str, str]:
    """`attempt`, with every allocation of Python and numpy counted. Raises Bug for too large a peak."""
    tracemalloc.start(1)
    try:
        outcome = attempt(target, entry)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result.worst_factor = max(result.worst_factor, peak / max(len(entry), 1 << 14))
    if peak > ALLOWED_BYTES + ALLOWED_FACTOR * len(entry):
        raise Bug(f"{target.name}: {peak} bytes allocated for an entry of {len(entry)}")
    return outcome


@contextmanager
def alarms() -> Iterator[None]:
    """While this runs, an entry that takes too long is a Bug."""

    def late(*_: Any) -> None:
        raise Bug(f"hang: {''.join(traceback.format_stack(limit=3))}")

    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def replay(target: Target, entries: Iterable[bytes], check: bool = True) -> tuple[str, str]:
    """The outcome of the last entry. Raises Bug."""
    target.begin()
    outcome = ("nothing", "")
    for entry in entries:
        outcome = attempt(target, entry)
    target.end()
    if check:
        target.check()
    return outcome


def shortest(target: Target, entries: list[bytes], wanted: tuple[str, str] | str) -> list[bytes]:
    """The same outcome, or the bug of the same signature, with as few entries as dropping one by one leaves."""
    place = len(entries) - 2
    while place >= 0:
        fewer = entries[:place] + entries[place + 1 :]
        try:
            same = replay(target, fewer, check=isinstance(wanted, str)) == wanted
        except Bug as bug:
            same = bug.signature == wanted
        if same:
            entries = fewer
        place -= 1
    return entries


def save(folder: Path, target: str, label: str, entries: list[bytes]) -> Path:
    """Write a corpus file: entries behind their lengths."""
    data = b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    words = "".join(letter if letter.isalnum() else "-" for letter in label)[:40]
    path = folder / f"{target}.{words}.{hashlib.sha256(data).hexdigest()[:8]}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def load(path: Path) -> list[bytes]:
    """The entries of a corpus file."""
    data, entries, at = path.read_bytes(), [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        entries.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return entries


def pack(parts: Iterable[bytes]) -> bytes:
    """Several byte strings in one."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """What `pack` packed."""
    parts, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return parts


def _signature(error: BaseException) -> str:
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "/fuzz/" not in one.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "harness"
    ours = [one for one in frames if "site-packages" not in one.filename and "/lib/python" not in one.filename]
    here = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else where
    return f"{type(error).__name__} in {here}"
