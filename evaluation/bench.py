"""`cleave-bench`: the protected scheme beside its baselines, in one run, on one machine, over real processes.

A cluster of its own for each scheme, precision and data plane, and a process for each row of the transformers library;
all of them run all the time, and idle ones do nothing. After a short answer that warms everything up, repetitions go
round: one of every row, then again. What a repetition is stands in measure.py. Speeds are decode rates as a client sees
them. Pads are made between repetitions, so secure-infer is measured with pads in stock (online); sustained is the speed
with the making of a pad per token in it.

With --budget-curve: some schemes in many memory budgets (curve.py). With --soak: many clients while things break. With
--extraction: what an attacker reproduces of an adapted model (extraction.py). With --fhe: one linear under homomorphic
encryption (fhe.py). What every figure means: docs/benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from client.terminal import Progress, one_line, size, unwind_on_signals
from deploy.local.cluster import Settings
from evaluation import bars, curve, extraction, fhe, flags, machine_rates, pictures, plot, ratios, roofline
from evaluation.bench_tables import bench_table, fhe_table
from evaluation.curve import Place, Trial, measure_point
from evaluation.judge import problems
from evaluation.measure import Load, Rig
from evaluation.planner import Planner, budget_flag, worker_flags
from evaluation.roofline import Rates
from evaluation.rounds import Found, measure
from evaluation.rows import rows
from evaluation.shapes import model_folder
from evaluation.sizing import LEAST_BYTES, available_bytes, curve_budgets, least, pad_bank
from evaluation.soak import Plan, Soak
from evaluation.tables import curve_table, extraction_table, soak_table
from wire.errors import CleaveError
from wire.model_config import ModelConfig

INTERRUPTED = 130


def main() -> None:
    """Run what was asked for. Status 1 with one line for what goes wrong, or when the soak or the curve finds it."""
    options, progress = flags.parse(), Progress(sys.stderr)
    unwind_on_signals()
    work = {"soak": soak, "budget_curve": budget_curve, "extraction": extract, "fhe": encrypted}
    chosen = next((run for name, run in work.items() if getattr(options, name)), bench)
    try:
        status = chosen(options, model_folder(options.model, progress), progress)
    except CleaveError as error:
        status = _fail(progress, ": ".join([*getattr(error, "__notes__", []), one_line(str(error))]), 1)
    except KeyboardInterrupt:
        status = _fail(progress, "interrupted", INTERRUPTED)
    sys.exit(status)


def bench(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """Measure, print and draw. Raises CleaveError."""
    if options.plot:
        pictures.require(options.plot)
    loads = [Load(context, options.tokens, batch) for batch in options.batch for context in options.context]
    plan = Planner(options, folder, loads, progress).plan()
    before = _rates(progress)
    found = measure(plan.starts, loads, options.repeat, plan.together)
    rates = Rates.best([before, machine_rates.measured(progress)]) if before else None
    progress.clear()
    result = _header(options, folder, "context", "tokens", "batch", "repeat", "prefill", "projections")
    result["notes"] = plan.notes
    result["interleaved"] = "running clusters" if plan.together else "clusters started for each repetition"
    result |= {"rates": asdict(rates) if rates else None, "rows": _rows(folder, found, options.tokens, rates)}
    result["ratios"] = ratios.as_dicts(ratios.ratios(found))
    _print(options, result, bench_table)
    if options.plot:
        bars.draw(result, options.plot)
    return 0


def budget_curve(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """Measure, print and draw. Status 1 when a point has no figures that should have some. Raises CleaveError."""
    if options.plot:
        pictures.require(options.plot)
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
    budget, bank = budget_flag(options, LEAST_BYTES), str(options.pad_bank or LEAST_BYTES)
    seconds, more = 60 * options.minutes, worker_flags(options, options.data_plane)
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


def encrypted(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """One linear in three ways. Raises CleaveError."""
    found = fhe.measure(folder, options.repeat, progress)
    progress.clear()
    result = {"machine": machine(), "command": sys.argv[1:], "model": folder.name, "repeat": options.repeat}
    _print(options, result | found, fhe_table)
    return 0


def machine() -> str:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {model}, Python {platform.python_version()}"


def _rates(progress: Progress) -> Rates | None:
    """None without torch."""
    return machine_rates.measured(progress) if importlib.util.find_spec("torch") else None


def _rows(folder: Path, found: Found, tokens: int, rates: Rates | None) -> list[dict[str, Any]]:
    config = ModelConfig.from_hf(folder)
    return [asdict(one) | roofline.as_dict(config, one, tokens, rates) for one in rows(found)]


def _places(options: argparse.Namespace, config: ModelConfig, trial: Trial) -> list[Place]:
    """All points, from the smallest budget. Raises ContextError for a context that the model lacks."""
    longest = trial.long or trial.load
    budgets = options.budgets or curve_budgets(config, options.rows, trial.load, available_bytes() // 2)
    enough = {(scheme, precision): least(config, scheme, precision, longest) for scheme, precision in options.rows}
    return [Place(*row, budget, enough[row]) for budget in budgets for row in enough]


def _bank(options: argparse.Namespace, config: ModelConfig, place: Place, trial: Trial) -> int:
    loads = [load for load in (trial.load, trial.long) if load is not None]
    return options.pad_bank or pad_bank(config, place.scheme, place.precision, loads)


def _rig(
    options: argparse.Namespace, folder: Path, place: Place, bank: int, load: Load, progress: Progress, digests: bool
) -> Rig:
    """The cluster of a point. `digests`: whether those of tiles are compared."""
    more = (*worker_flags(options, options.data_plane), *(() if digests else ("--insecure-unchecked-tiles",)))
    settings = Settings(folder, place.scheme, place.precision, str(place.budget), str(bank), options.device, more=more)
    return Rig(settings, [load], lambda stage, seconds: progress(f"{size(place.budget)}: {stage}", seconds))


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
