"""`cleave-bench`: the protected scheme beside its baselines, in one run, on one machine, over real processes.

A cluster of its own for each scheme and precision; all of them run all the time, and idle ones do nothing. After one
answer that warms everything up, repetitions go round: one of every row, then again. What a repetition is stands in
measure.py. Speeds are decode rates as a client sees them. Pads are made between repetitions, so secure-infer is
measured with pads in stock (online), and the time that making one takes is printed beside it (offline, same cores).
"""

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from client.terminal import Progress, one_line
from deploy.local.cluster import Settings
from evaluation import flags
from evaluation.judge import problems
from evaluation.measure import Load, Rig
from evaluation.rounds import Key, measure
from evaluation.rows import as_dicts, relative
from evaluation.shapes import model_folder
from evaluation.sizing import FILL, LEAST_BYTES, available_bytes, sizes
from evaluation.soak import Plan, Soak
from evaluation.tables import bench_table, soak_table
from wire.errors import CleaveError
from wire.model_config import ModelConfig

INTERRUPTED = 130


def main() -> None:
    """Run the bench or the soak. Status 1 with one line for what goes wrong, or when the soak finds something."""
    options, progress = flags.parse(), Progress(sys.stderr)
    try:
        folder = model_folder(options.model, progress)
        status = soak(options, folder, progress) if options.soak else bench(options, folder, progress)
    except CleaveError as error:
        status = _fail(progress, ": ".join([*getattr(error, "__notes__", []), one_line(str(error))]), 1)
    except KeyboardInterrupt:
        status = _fail(progress, "interrupted", INTERRUPTED)
    sys.exit(status)


def bench(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """Measure and print. Raises CleaveError."""
    load = Load(options.context, options.tokens, options.batch)
    settings, together = _plan(options, folder, load)
    starts = {key: partial(Rig, one, load, progress) for key, one in settings.items()}
    rows = relative(measure(starts, options.repeat, together))
    progress.clear()
    result = _header(folder) | {
        "context": load.context,
        "tokens": load.tokens,
        "batch": load.batch,
        "repeat": options.repeat,
        "interleaved": "running clusters" if together else "clusters started for each repetition",
        "rows": as_dicts(rows),
    }
    if options.markdown or not options.json:
        print(bench_table(result))
    if options.json:
        print(json.dumps(result))
    return 0


def soak(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """One soak for each scheme. Raises CleaveError."""
    result: dict[str, Any] = _header(folder)
    for name in ("minutes", "clients", "seed"):
        result[name] = getattr(options, name)
    result["soaks"] = []
    budget, bank = (str(size or LEAST_BYTES) for size in (options.memory_budget, options.pad_bank))
    for scheme in options.schemes:
        plan = Plan(folder, scheme, 60 * options.minutes, options.clients, options.seed, budget, bank)
        found = Soak(plan, progress, options.log).run()
        row = {"scheme": scheme, "precision": plan.precision, **found.report(), "problems": problems(found)}
        result["soaks"].append(row)
    progress.clear()
    print(json.dumps(result) if options.json else soak_table(result))
    return int(any(one["problems"] for one in result["soaks"]))


def machine() -> str:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {model}, Python {platform.python_version()}"


def _plan(options: argparse.Namespace, folder: Path, load: Load) -> tuple[dict[Key, Settings], bool]:
    """What every row's cluster is told, and whether all of them fit into memory together."""
    config, available, settings, taken = ModelConfig.from_hf(folder), available_bytes(), dict[Key, Settings](), 0
    for scheme, precision in options.rows:
        size = sizes(config, scheme, precision, load, available)
        budget, bank = options.memory_budget or size.memory_budget, options.pad_bank or size.pad_bank
        settings[scheme, precision] = Settings(folder, scheme, precision, str(budget), str(bank), options.device)
        taken += size.resident
    return settings, not options.one_at_a_time and taken <= FILL * available


def _header(folder: Path) -> dict[str, Any]:
    return {"machine": machine(), "command": sys.argv[1:], "model": folder.name}


def _fail(progress: Progress, text: str, status: int) -> int:
    progress.clear()
    print(f"cleave-bench: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
