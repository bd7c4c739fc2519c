"""docs/faults.md: every run of a cell compares what it saw with the page; CLEAVE_WRITE_FAULTS=1 writes the page."""

import os
from pathlib import Path

from tests.faults.cells import FAULTS, MOMENTS, STOPPED, VICTIMS, Cell
from tests.faults.fleet import CLIENT_SECONDS, DEADLINES, GPU

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
WRITING = bool(os.environ.get("CLEAVE_WRITE_FAULTS"))
SHIELDED = f"{GPU}, kv-shield"
ROWS = [(victim, moment) for victim in (*VICTIMS, SHIELDED) for moment in MOMENTS]

_HEAD = """# Faults

What the others report when a party fails, and what it takes to go on. The page is written by tests: `tests/faults`
runs both workers and a client as processes, with links between them that can be held and cut, brings a conversation to
a moment, strikes, and compares what it saw with this table. This wrote it:

```
CLEAVE_WRITE_FAULTS=1 .venv/bin/pytest -m "soak or not soak" tests/faults
```

`make test` runs one cell of each pair of victim and fault and of victim and moment, `make soak` the others.

- **Victims**: one worker, or the client. A cut connection of the trusted worker is that to both others.
- **Moments**: idle, a session that has had an answer and says nothing; prefill, a prompt of 150 tokens whose first
  products are on their way; decode, after the first token of an answer, with a credit of 1.
- **Faults**: `kill -9`; `SIGSTOP` for {stopped:g} s, longer than the deadlines; connections reset and refused.
- **Deadlines**: {flags} on the trusted
  worker; `--timeout {timeout:g}` of the client, 1 when the trusted worker is stopped.

In every cell, besides what it says: the report comes within its deadline, and is in the words of this project; the
session and its memory are freed; a fresh session gets the right answer at the first attempt once the victim is back,
and no other process was restarted for it; no pad is used twice, and no word of the lost calls crosses again.

"""

_TAIL = """
## Hostile clients

`tests/faults/test_hostile_clients.py`: while one client is served token by token, others connect 300 times and say
nothing, send half a message or garbage, open 100 streams that never begin, open more sessions than there are, send tiny
frames without end, or vanish with credit outstanding. The one gets its answer. None of these adds more than 32 MiB to
the trusted worker's resident memory, and sessions, memory of the arena, files and threads return to what they were.
"""


class Table:
    """Sentences of cells: those of the page, and those seen in this run."""

    def __init__(self) -> None:
        self._written = {} if WRITING or not PAGE.exists() else _read(PAGE.read_text(encoding="utf-8"))
        self._seen: dict[Cell, str] = {}

    def note(self, cell: Cell, sentence: str) -> None:
        """A cell was run. Raises AssertionError when the page says something else."""
        self._seen[cell] = sentence
        if not WRITING:
            assert self._written.get(cell) == sentence, f"docs/faults.md says otherwise: {self._written.get(cell)}"

    def end(self) -> None:
        """Write the page, if that was asked and every cell was run."""
        cells = [Cell(victim, moment, fault) for victim, moment in ROWS for fault in FAULTS]
        if WRITING and all(cell in self._seen for cell in cells):
            PAGE.write_text(self._page(), encoding="utf-8")

    def _page(self) -> str:
        flags = ", ".join(f"`--{name}-seconds {seconds:g}`" for name, seconds in DEADLINES.items())
        lines = [f"| victim | moment | {' | '.join(FAULTS)} |", "|" + "---|" * (2 + len(FAULTS))]
        for victim, moment in ROWS:
            cells = (self._seen[Cell(victim, moment, fault)] for fault in FAULTS)
            lines.append(f"| {victim} | {moment} | {' | '.join(cells)} |")
        head = _HEAD.format(flags=flags, timeout=CLIENT_SECONDS, stopped=STOPPED)
        return head + "\n".join(lines) + "\n" + _TAIL


def _read(page: str) -> dict[Cell, str]:
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {Cell(row[0], row[1], fault): text for row in rows[2:] for fault, text in zip(FAULTS, row[2:], strict=True)}
