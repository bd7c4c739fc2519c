"""Recordings, and then attacks, two at a time: none of them needs another one's result.

Each runs in a process of a pool. What it needs is made there again from the same few arguments: the script is
always the same for them, and recordings are mapped, not copied. So no result depends on who computed it.
"""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from client.flags import DEMO_MODEL
from client.terminal import unwind_on_signals
from deploy.local.child import Progress
from evaluation.attacks.knowledge import Fact, Ints
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage import residue, stage, tampering
from evaluation.leakage.cells import Cell
from evaluation.leakage.prompts import FULL, QUICK, Script, script
from evaluation.leakage.suite import Measured, tried
from evaluation.leakage.table import ATTACKS, RELATIVES, Entry
from evaluation.transcript import Transcript
from wire.lifetime import die_with_parent

AT_ONCE = 2  # the machines that build this have two cores
LOOK_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What is attacked: a model folder, under one of the two scripts, as recorded in a folder of transcripts."""

    folder: Path
    quick: bool
    seed: int
    transcripts: Path

    def recording(self, scheme: str) -> Path:
        """Where a scheme is recorded."""
        return self.transcripts / scheme


class Scene:
    """What a job is about. Whatever is asked for is made once, and kept."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def script(self) -> Script:
        """What clients say. Raises CheckpointError, PreconditionError."""
        return script(PublicModel(self._job.folder), QUICK if self._job.quick else FULL, self._job.seed)

    @cached_property
    def views(self) -> dict[str, View]:
        """What was recorded. Raises PreconditionError."""
        lengths = self.script.knowledge.lengths
        return {one.name: View.of(Transcript.read(self._job.recording(one.name)), lengths) for one in stage.STAGED}

    @cached_property
    def answers(self) -> dict[str, Ints]:
        """How many tokens each answer had."""
        files = {one.name: self._job.recording(one.name) / stage.ANSWERS for one in stage.STAGED}
        return {name: np.array(json.loads(file.read_text("ascii"))) for name, file in files.items()}


@cache
def scene(job: Job) -> Scene:
    """The same one for the same job, in each process."""
    return Scene(job)


class Crew:
    """A context manager. Start it in the main thread."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress = job, progress
        start = partial(_begin, os.getpid())
        self._pool = ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("spawn"), start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # what still runs is not waited for
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def record(self) -> None:
        """All schemes that are not recorded yet. Raises CleaveError."""
        missing = [one for one in stage.STAGED if not (self._job.recording(one.name) / stage.ANSWERS).is_file()]
        self._all("recorded", [partial(_record, self._job, one) for one in missing])

    def attack(self) -> list[Cell]:
        """Cells without verdicts, in the order of the table. Raises CleaveError."""
        groups: dict[str, list[Entry]] = {}
        for entry in ATTACKS:  # those of one file share what they have computed
            groups.setdefault(entry.attack.__module__ if entry.attack else entry.name, []).append(entry)
        names = [[entry.name for entry in group] for group in groups.values()]
        found = self._all("attacks made", [partial(_attack, self._job, group) for group in names])
        place = {entry.name: number for number, entry in enumerate(ATTACKS)}
        return sorted((cell for cells in found for cell in cells), key=lambda cell: place[cell.attack])

    def _all(self, what: str, pieces: Sequence[Callable[[], T]]) -> list[T]:
        started = time.monotonic()
        futures: list[Future[T]] = [self._pool.submit(_piece, piece) for piece in pieces]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, LOOK_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            self._progress(f"{what}: {len(futures) - len(pending)} of {len(futures)}", time.monotonic() - started)
        return [future.result() for future in futures]


def _begin(parent: int) -> None:
    """A process of the pool: it ends with its parent, who alone is interrupted. It stops its own workers first."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # what a trusted worker that is put together here would warn its owner of
    unwind_on_signals()


def _piece(piece: Callable[[], T]) -> T:
    """Run it. A signal ends the process, and is no result: the pool would go on with the next piece."""
    try:
        return piece()
    except SystemExit:
        os._exit(1)


def _record(job: Job, staged: stage.Staged) -> None:
    stage.record(staged, job.folder, scene(job).script, job.recording(staged.name), lambda *_: None)


def _attack(job: Job, names: Sequence[str]) -> list[Cell]:
    known = scene(job)
    views = dict(known.views)
    for relative in RELATIVES:
        if set(names) & set(relative.shown_by):
            views[relative.name] = relative.made(known.views, known.script)
    entries = [entry for entry in ATTACKS if entry.name in names]
    return tried(views, known.script, entries, _measured(job, names), known.answers)


def _measured(job: Job, names: Sequence[str]) -> Measured:
    """What no transcript holds."""
    found: dict[str, Mapping[str, list[Fact] | str]] = {}
    if "tampering" in names:
        found["tampering"] = tampering.facts(job.folder, DEMO_MODEL, job.seed)
    if "residue" in names:
        said = scene(job).script
        found["residue"] = {one.name: residue.facts(job.recording(one.name), said) for one in stage.STAGED}
    return found
