"""Residue: what the GPU worker's memory and files still hold of conversations that are over.

Released memory is not cleared, neither a CPU's by its allocator nor a GPU's by CUDA (LeftoverLocals, CVE-2023-4969). So
while the worker still runs, its sessions closed, everything that it can write to is searched for canaries: the token
ids of the conversations, as they would lie there. One that is found is enough: how many are is the allocator's whim.
What the recording put there counts as well: it is what the worker was given. GPU memory cannot be read from outside and
is not searched.

(1) A canary is WINDOW consecutive ids, of 32 or of 64 bits: the first, those from the second on, the last. A prompt
    that is shorter has none.
(2) Its first 16 bytes are looked for by a hash, at every place that a word can lie; then all of it is compared.
(3) Tokens are drawn uniformly, so a place that knows nothing of them holds one with a probability of V^-WINDOW.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Fact
from evaluation.leakage.prompts import Script
from wire.errors import PreconditionError

FILE = "residue.json"
WINDOW = 7  # tokens
HEAD, BITS = 16, 24  # bytes that are hashed, and bits that they become
CHUNK = 32 << 20  # bytes read at a time
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)

Bools = npt.NDArray[np.bool_]


def search(pid: int, recording: Path, script: Script) -> None:
    """Search a GPU worker that runs and write what was found, or why nothing could be, beside its recording."""
    wanted, found, size = canaries(script), set[int](), 0
    try:
        for chunk in _chunks(pid, recording):
            size += len(chunk)
            found |= matches(chunk, wanted)
        said: dict[str, object] = {"bytes": size, "canaries": len(wanted), "found": sorted(found)}
    except OSError as error:
        said = {"reason": f"the memory of another process cannot be read here: {error.strerror}"}
    (recording / FILE).write_text(json.dumps(said))


def facts(recording: Path, script: Script) -> list[Fact] | str:
    """What was found, or why nothing is known. Raises PreconditionError for a recording that was not searched."""
    try:
        said = json.loads((recording / FILE).read_text())
    except (OSError, ValueError) as error:
        raise PreconditionError(f"{recording} has no {FILE}: record again") from error
    if "reason" in said:
        return str(said["reason"])
    places, vocabulary = said["bytes"] / 4, script.knowledge.model.config.vocabulary
    chance = min(1.0, places * said["canaries"] * float(vocabulary) ** -WINDOW)
    hits = int(bool(said["found"]))
    return [Fact("token ids of any conversation", "found", hits, 1, chance, chance if hits else 1.0)]


def canaries(script: Script) -> dict[bytes, list[int]]:
    """(1) And the numbers of the prompts that it is of."""
    found: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(script.prompts):
        starts = {start for start in (0, 1, len(prompt) - WINDOW) if 0 <= start <= len(prompt) - WINDOW}
        for start in sorted(starts) if number != script.knowledge.repeated else ():
            for dtype in ("<i4", "<i8"):
                ids = prompt[start : start + WINDOW].astype(dtype)
                found.setdefault(ids.tobytes(), []).append(number)
    return found


def matches(chunk: bytes, wanted: dict[bytes, list[int]]) -> set[int]:
    """(2) The numbers of prompts of which something lies in a chunk."""
    table, found = np.zeros(1 << BITS, bool), set[int]()
    table[_hash(np.frombuffer(b"".join(one[:HEAD] for one in wanted), np.uint64).reshape(-1, 2))] = True
    for shift in (0, 4) if len(chunk) >= HEAD + 4 else ():
        words = np.frombuffer(chunk, np.uint64, (len(chunk) - shift) // 8, shift)
        pairs = np.lib.stride_tricks.sliding_window_view(words, 2)
        for place in np.flatnonzero(table[_hash(pairs)]):
            at = shift + 8 * int(place)
            found |= {number for one, numbers in wanted.items() if chunk.startswith(one, at) for number in numbers}
    return found


def _hash(pairs: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed: npt.NDArray[np.uint64] = (pairs[:, 0] * _MIX[0] + pairs[:, 1] * _MIX[1]) >> np.uint64(64 - BITS)
    return mixed


def _chunks(pid: int, recording: Path) -> Iterator[bytes]:
    """All that a process can write to: its memory, and files that it has open, but for the recording."""
    process, margin = Path(f"/proc/{pid}"), 2 * WINDOW * 8
    with (process / "mem").open("rb", 0) as memory:
        for line in (process / "maps").read_text().splitlines():
            bounds, mode = line.split()[:2]
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            for at in range(start, end if mode.startswith("rw") else start, CHUNK):
                yield _read(memory, at, min(CHUNK + margin, end - at))
    for entry in (process / "fd").iterdir():
        target = entry.resolve()
        if stat.S_ISREG(os.stat(entry).st_mode) and recording.resolve() not in target.parents and _written(entry):
            with entry.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk


def _read(memory: BinaryIO, at: int, size: int) -> bytes:
    """Memory of another process; none where there is no page behind it."""
    try:
        memory.seek(at)
        return memory.read(size)
    except OSError:
        return b""


def _written(entry: Path) -> bool:
    """Whether a descriptor may write."""
    flags = (entry.parent.parent / "fdinfo" / entry.name).read_text().split("flags:")[1].split()[0]
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
