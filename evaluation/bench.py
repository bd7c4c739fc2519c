"""`cleave-bench`: the protected scheme beside its baselines, in one run, on one machine, over real processes.

A cluster of its own for each scheme and precision; all of them run all the time, and idle ones do nothing. After one
answer that warms everything up, repetitions go round: one of every row, then again. What a repetition is stands in
measure.py. Speeds are decode rates as a client sees them. Pads are made between repetitions, so secure-infer is
measured with pads in stock (online), and the time that making one takes is printed beside it (offline, same cores).

With --budget-curve: some schemes in many memory budgets (curve.py). With --soak: many clients while things break. With
--extraction: what an attacker reproduces of an adapted model (extraction.py).
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from client.terminal import Progress, one_line, size
from deploy.local.cluster import Settings
from evaluation import curve, extraction, flags, plot
from evaluation.curve import Place, Trial, measure_point
from evaluation.judge import problems
from evaluation.measure import Load, Rig
from evaluation.rounds import Key, measure
from evaluation.rows import as_dicts, relative
from evaluation.shapes import model_folder
from evaluation.sizing import FILL, LEAST_BYTES, available_bytes, curve_budgets, least, pad_bank, sizes
from evaluation.soak import Plan, Soak
from evaluation.tables import bench_table, curve_table, extraction_table, soak_table
from wire.errors import CleaveError
from wire.model_config import ModelConfig

INTERRUPTED = 130


def main() -> None:
    """Run what was asked for. Status 1 with one line for what goes wrong, or when the soak or the curve finds it."""
    options, progress = flags.parse(), Progress(sys.stderr)
    work = {"soak": soak, "budget_curve": budget_curve, "extraction": extract}
    chosen = next((run for name, run in work.items() if getattr(options, name)), bench)
    try:
        status = chosen(options, model_folder(options.model, progress), progress)
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
    result = _header(options, folder, "context", "tokens", "batch", "repeat")
    result["interleaved"] = "running clusters" if together else "clusters started for each repetition"
    _print(options, result | {"rows": as_dicts(rows)}, bench_table)
    return 0


def budget_curve(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """Measure, print and draw. Status 1 when a point has no figures that should have some. Raises CleaveError."""
    if options.plot:
        plot.require(options.plot)
    config, load = ModelConfig.from_hf(folder), Load(options.context, options.tokens, options.batch)
    trial = Trial(load, options.repeat, replace(load, context=options.long_context) if options.long_context else None)
    points = []
    for place in _places(options, config, trial):
        start = partial(_rig, options, folder, place, _bank(options, config, place, trial), load, progress)
        points.append(measure_point(place, config.layers, start, trial))
    progress.clear()
    result = _header(options, folder, "context", "long_context", "tokens", "batch", "repeat")
    result["points"] = curve.as_dicts(points)
    _print(options, result, curve_table)
    if options.plot:
        plot.draw(result, options.plot)
    return int(any(point.failed for point in points))


def soak(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """One soak for each scheme. Raises CleaveError."""
    result = _header(options, folder, "minutes", "clients", "seed") | {"soaks": []}
    budget, bank = _budget(options, LEAST_BYTES), str(options.pad_bank or LEAST_BYTES)
    seconds, more = 60 * options.minutes, _more(options)
    for scheme in options.schemes:
        plan = Plan(folder, scheme, seconds, options.clients, options.seed, budget, bank, more)
        found = Soak(plan, progress, options.log).run()
        row = {"scheme": scheme, "precision": plan.precision, **found.report(), "problems": problems(found)}
        result["soaks"].append(row)
    progress.clear()
    print(json.dumps(result) if options.json else soak_table(result))
    return int(any(one["problems"] for one in result["soaks"]))


def extract(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """What an attacker reproduces. Raises CleaveError."""
    scores = extraction.measure(folder, options.prompts, progress)
    progress.clear()
    result: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:], "model": folder.name}
    result |= {"adapter": extraction.ADAPTER, "prompts": options.prompts, "tested": extraction.TESTED}
    result |= {"scores": extraction.as_dicts(scores)}
    print(json.dumps(result) if options.json else extraction_table(result))
    return 0


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
        needed = sizes(config, scheme, precision, load, available)
        budget, bank = _budget(options, needed.memory_budget), str(options.pad_bank or needed.pad_bank)
        settings[scheme, precision] = Settings(
            folder, scheme, precision, budget, bank, options.device, more=_more(options)
        )
        taken += needed.resident
    return settings, not options.one_at_a_time and taken <= FILL * available


def _places(options: argparse.Namespace, config: ModelConfig, trial: Trial) -> list[Place]:
    """All points, from the smallest budget. Raises ContextError for a context that the model lacks."""
    longest = trial.long or trial.load
    budgets = options.budgets or curve_budgets(config, options.rows, trial.load, available_bytes() // 2)
    enough = {(scheme, precision): least(config, scheme, precision, longest) for scheme, precision in options.rows}
    return [Place(*row, budget, enough[row]) for budget in budgets for row in enough]


def _bank(options: argparse.Namespace, config: ModelConfig, place: Place, trial: Trial) -> int:
    loads = [load for load in (trial.load, trial.long) if load is not None]
    return options.pad_bank or max(pad_bank(config, place.scheme, place.precision, load) for load in loads)


def _rig(
    options: argparse.Namespace, folder: Path, place: Place, bank: int, load: Load, progress: Progress, digests: bool
) -> Rig:
    """The cluster of a point. `digests`: whether those of tiles are compared."""
    more = (*_more(options), *(() if digests else ("--insecure-unchecked-tiles",)))
    settings = Settings(folder, place.scheme, place.precision, str(place.budget), str(bank), options.device, more=more)
    return Rig(settings, load, lambda stage, seconds: progress(f"{size(place.budget)}: {stage}", seconds))


def _budget(options: argparse.Namespace, default: int) -> str | None:
    """For the trusted worker's command line; None where the profile says it."""
    given: int | None = options.memory_budget
    return None if options.tee_profile and given is None else str(given or default)


def _more(options: argparse.Namespace) -> tuple[str, ...]:
    """Further words of the trusted worker's command line."""
    profile = ("--tee-profile", options.tee_profile) if options.tee_profile else ()
    plane = ("--data-plane", options.data_plane) if options.data_plane != "grpc" else ()
    return (*profile, *plane, *(("--switch-us", str(options.switch_us)) if options.switch_us else ()))


def _header(options: argparse.Namespace, folder: Path, *names: str) -> dict[str, Any]:
    """What was measured, with the options of these names."""
    asked = {name: getattr(options, name) for name in ("tee_profile", "switch_us", "data_plane", *names)}
    return {"machine": machine(), "command": sys.argv[1:], "model": folder.name, **asked}


def _print(options: argparse.Namespace, result: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> None:
    if options.markdown or not options.json:
        print(table(result))
    if options.json:
        print(json.dumps(result))


def _fail(progress: Progress, text: str, status: int) -> int:
    progress.clear()
    print(f"cleave-bench: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
