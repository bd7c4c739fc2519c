"""cleave-leakage: record every scheme, attack the recordings, print what was recovered; status 1 when the gate fails.

--quick is the tier that gates the build: the demo model, some minutes. Without it the script is said to a larger model.
Transcripts are kept with --transcripts DIR, and attacked again when they lie there already: the same transcripts and
the same seed give the same report, but for its seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.flags import DEMO_MODEL, Parser
from client.terminal import Progress, one_line, unwind_on_signals
from evaluation import pictures
from evaluation.bench import INTERRUPTED, machine
from evaluation.leakage import heatmap, report, suite, table
from evaluation.leakage.cells import FAMILY_ERROR, NOTHING_SENT, not_run, threshold
from evaluation.leakage.crew import Crew, Job, scene
from evaluation.shapes import model_folder
from wire.errors import CleaveError, PreconditionError

FULL_MODEL = "shape:qwen2.5-0.5b"
SCHEMA = 1


def run() -> int:
    """Status 0: the gate is passed; 1: it is not, or something went wrong."""
    options, progress = _parse(), Progress(sys.stderr)
    unwind_on_signals()
    try:
        return _run(options, progress)
    except CleaveError as error:
        return _fail(progress, one_line(str(error)), 1)
    except KeyboardInterrupt:
        return _fail(progress, "interrupted", INTERRUPTED)


def measure(job: Job, progress: Progress) -> dict[str, Any]:
    """Record what is not there yet, attack all of it. In the main thread. Raises CleaveError."""
    said = scene(job).script
    with Crew(job, progress) as crew:
        crew.record()
        cells = suite.verdicts(crew.attack())
    progress.clear()
    cells += [not_run("tee-only", one.name, one.knowledge, NOTHING_SENT) for one in table.ATTACKS]
    limit = threshold(cells, table.PROTECTED, table.BY_DESIGN)
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "commit": _commit(),
        "model": job.folder.name,
        "model_digest": said.knowledge.model.config.digest.hex(),
        "tier": "quick" if job.quick else "full",
        "seed": job.seed,
        "prompts": len(said.prompts),
        "tokens": sum(said.knowledge.lengths),
        "exposed_by_design": report.EXPOSED,
        "cells": [asdict(one) for one in cells],
        "gate": {"family_error": FAMILY_ERROR, "p_below": limit, "failures": suite.failures(cells)},
    }


def _run(options: argparse.Namespace, progress: Progress) -> int:
    _require(options)
    folder = model_folder(options.model, progress)
    with tempfile.TemporaryDirectory(prefix="cleave-") as private:
        job = Job(folder, options.quick, options.seed, options.transcripts or Path(private))
        result = measure(job, progress)
    if options.plot:
        heatmap.draw(result, options.plot)
    if options.markdown:
        _write(options.markdown, report.document(result, options.plot))
    print(json.dumps(result) if options.json else report.document(result, options.plot))
    for failure in result["gate"]["failures"]:
        print(f"cleave-leakage: {failure}", file=sys.stderr)
    return int(bool(result["gate"]["failures"]))


def _parse() -> argparse.Namespace:
    parser = Parser(
        allow_abbrev=False,
        prog="cleave-leakage",
        description="Attacks on what the GPU worker sees, under every scheme; status 1 when the gate fails.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the tier that gates the build: the demo model, some minutes")
    add("--model", metavar="DIR", help=f"a model folder or shape:NAME (default: the demo model, or {FULL_MODEL})")
    add("--seed", type=int, default=0, metavar="N", help="of the script and of the attacks (default: 0)")
    add("--transcripts", type=Path, metavar="DIR", help="where recordings are kept, and taken from if they are there")
    add("--json", action="store_true", help="print the report as JSON instead of Markdown")
    add("--markdown", type=Path, metavar="FILE", help="write the report there, too")
    add("--plot", type=Path, metavar="FILE.png", help="draw the matrix there")
    options = parser.parse_args()
    if options.seed < 0:
        parser.error("--seed must not be negative")
    options.model = options.model or (str(DEMO_MODEL) if options.quick else FULL_MODEL)
    return options


def _require(options: argparse.Namespace) -> None:
    """Before anything takes long. Raises PreconditionError."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise PreconditionError("attacks need scipy: pip install 'cleave[leakage]'") from None
    if options.plot:
        pictures.require(options.plot)
    if options.markdown and not options.markdown.resolve().parent.is_dir():
        raise PreconditionError(f"{options.markdown} must be a file in a folder that is there")


def _commit() -> str:
    """Of the code that was attacked; empty where that is not known."""
    place = Path(__file__).parent
    done = subprocess.run(("git", "describe", "--always", "--dirty"), cwd=place, capture_output=True, check=False)
    return done.stdout.decode("ascii", "replace").strip()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise PreconditionError(f"{path} cannot be written: {error.strerror or error}") from error


def _fail(progress: Progress, text: str, status: int) -> int:
    progress.clear()
    print(f"cleave-leakage: {text}", file=sys.stderr)
    return status
