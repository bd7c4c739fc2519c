"""The command line of cleave-bench: flags, their ranges, and which of them go together."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.flags import DEMO_MODEL, Parser
from wire import profiles
from wire.profiles import PROFILES

ROWS = (  # scheme, precision
    ("plain", "float32"),
    ("plain", "int8"),
    ("kv-shield", "float32"),
    ("split", "float32"),
    ("split", "int8"),
    ("tee-only", "float32"),
    ("tee-only", "int8"),
    ("secure-infer", "int8"),
)
LIBRARY_ROWS = (("transformers", "float32"), ("transformers", "bfloat16"), ("transformers", "int8"))
SCHEMES = tuple(dict.fromkeys(scheme for scheme, _ in ROWS))
BENCHED = (*SCHEMES, "transformers")
OUTSIDE_NOTHING = ("tee-only", "transformers")  # no call goes from one worker to another
INSIDE = ("tee-only", "split", "secure-infer")  # their decoder, and so their KV cache, lies in the memory budget
_ONE_BUDGET: dict[str, Any] = {"memory_budget": None, "tee_profile": None}
_MEASURING: dict[str, Any] = {
    "context": (32,),
    "tokens": 64,
    "batch": (1,),
    "repeat": 5,
    "device": "auto",
    "markdown": False,
}
_BENCH = _ONE_BUDGET | _MEASURING
_BENCH |= {"schemes": BENCHED, "precision": "both", "one_at_a_time": False, "prefill": "auto", "no_compile": False}
_BENCH |= {"projections": None, "plot": None}
_CURVE = _MEASURING | {
    "schemes": ("tee-only", "secure-infer"),
    "precision": "int8",
    "tokens": 32,
    "repeat": 3,
    "budgets": None,
    "long_context": None,
    "plot": None,
}
_SOAK = _ONE_BUDGET | {"schemes": ("secure-infer",), "minutes": 30.0, "clients": 8, "seed": 0, "log": None}
_EXTRACTION = {"prompts": 64}
_FHE = {"repeat": 5, "markdown": False}
_WORK = {  # by the flag that asks for it
    "": _BENCH,
    "--soak": _SOAK,
    "--budget-curve": _CURVE,
    "--extraction": _EXTRACTION,
    "--fhe": _FHE,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; leaves with status 2 and one line when it makes no sense.

    `rows` are those to measure, `planes` the data planes.
    """
    parser = Parser(
        allow_abbrev=False,
        prog="cleave-bench",
        description="Every scheme beside its baselines, in one run; or, with --budget-curve, speed and context by "
        "memory budget; or, with --soak, many clients while things break; or, with --extraction, what an attacker "
        "reproduces of an adapted model; or, with --fhe, one linear under homomorphic encryption.",
    )
    _add_common(parser.add_argument)
    _add_bench(parser.add_argument_group("measuring").add_argument)
    _add_curve(parser.add_argument_group("budget curve").add_argument)
    _add_soak(parser.add_argument_group("soak").add_argument)
    _add_extraction(parser.add_argument_group("extraction").add_argument)
    _add_fhe(parser.add_argument_group("homomorphic encryption").add_argument)
    options = parser.parse_args(argv)
    _fill(parser, options)
    _check_planes(parser, options)
    options.rows = [] if options.soak or options.extraction or options.fhe else _rows(parser, options)
    return options


def _add_common(add: Callable[..., Any]) -> None:
    add("--model", default=str(DEMO_MODEL), metavar="DIR", help="a model folder, or shape:NAME; default: demo")
    add(
        "--schemes",
        type=_schemes,
        metavar="A,B",
        help=f"of {', '.join(BENCHED)}; default: all; of a soak, secure-infer; of a curve, tee-only,secure-infer",
    )
    add("--memory-budget", type=_size, metavar="SIZE", help="of the trusted worker; default: what is needed")
    add("--tee-profile", choices=PROFILES, metavar="NAME", help=f"that of a TEE: {', '.join(PROFILES)}")
    add("--switch-us", type=_integer(0, 1_000_000), default=0, metavar="N", help="charged per exchange; default: 0")
    add("--data-plane", choices=("grpc", "stream", "both"), default="grpc", help="between the workers; default: grpc")
    add("--pad-bank", type=_size, metavar="SIZE", help="sealed pads of secure-infer; default: what is needed")
    add("--json", action="store_true", help="one JSON object, in the last line of stdout")


def _add_bench(add: Callable[..., Any]) -> None:
    add("--precision", choices=("float32", "bfloat16", "int8", "both"), help="default: both, all that a scheme has")
    add("--context", type=_integers(1, 1 << 24), metavar="N,M", help="tokens of the prompt; default: 32")
    add("--tokens", type=_integer(2, 1 << 20), metavar="N", help="tokens that are decoded; default: 64")
    add("--batch", type=_integers(1, 64), metavar="N,M", help="sessions that decode at the same time; default: 1")
    add("--repeat", type=_integer(1, 1000), metavar="N", help="answers of each row; default: 5")
    add("--device", choices=("auto", "cpu", "cuda"), help="of the GPU worker; default: auto")
    add("--one-at-a-time", action="store_true", default=None, help="start each cluster anew for every repetition")
    add("--no-compile", action="store_true", default=None, help="leave torch.compile out of transformers' rows")
    add("--prefill", choices=("auto", "worker"), help="worker: pads for all rows of prompts, too; default: auto")
    add(
        "--projections",
        choices=("gpu", "trusted", "auto"),
        help="where secure-infer multiplies qkv and o; default: gpu",
    )
    add("--markdown", action="store_true", default=None, help="print the tables with --json, too")
    add("--plot", type=Path, metavar="FILE.png", help="draw the speeds, or the curve; needs matplotlib")


def _add_curve(add: Callable[..., Any]) -> None:
    add("--budget-curve", action="store_true", help="speed and context of schemes whose decoder is inside, by budget")
    add(
        "--budgets",
        type=_budgets,
        metavar="A,B",
        help="sizes and names of TEE profiles; default: all profiles, and larger ones until everything is resident",
    )
    add("--long-context", type=_integer(1, 1 << 24), metavar="N", help="measure once more behind a prompt of N tokens")


def _add_soak(add: Callable[..., Any]) -> None:
    add("--soak", action="store_true", help="answers must be right, memory flat, whatever breaks; status 1 if not")
    add("--minutes", type=_minutes, metavar="M", help="of each scheme; default: 30")
    add("--clients", type=_integer(1, 32), metavar="N", help="default: 8")
    add("--seed", type=_integer(0, 1 << 32), metavar="N", help="of prompts and faults; default: 0")
    add("--log", type=argparse.FileType("w"), metavar="FILE", help="write the workers' logs to it")


def _add_extraction(add: Callable[..., Any]) -> None:
    add("--extraction", action="store_true", help="what an attacker reproduces of the demo model's adapter, from what")
    add("--prompts", type=_integer(8, 500), metavar="N", help="conversations that are recorded; default: 64")


def _add_fhe(add: Callable[..., Any]) -> None:
    add(
        "--fhe",
        action="store_true",
        help="one linear under CKKS, under a one-time pad, and in the clear; needs tenseal",
    )


def _fill(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Defaults of what is done; a flag of the other things is an error."""
    given = [flag for flag in _WORK if flag and getattr(options, flag[2:].replace("-", "_"))]
    if len(given) > 1:
        parser.error(f"{given[0]} does not go with {given[1]}")
    if options.soak and "transformers" in (options.schemes or ()):
        parser.error("transformers is no scheme of a worker: it cannot be soaked")
    if options.extraction and (options.model != str(DEMO_MODEL) or options.pad_bank or options.switch_us):
        parser.error("--extraction is of the demo model and its adapter, with settings of its own")
    asked = options.work = given[0] if given else ""
    ours = _WORK[asked]
    for name in {name: None for work in _WORK.values() for name in work}:
        if name not in ours and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            owners = " or ".join(owner for owner, work in _WORK.items() if name in work)
            parser.error(f"{flag} does not go with {asked}" if asked else f"{flag} needs {owners}")
    options.named = options.schemes is not None
    for name, value in ours.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.tee_profile = options.tee_profile or ""
    if "memory_budget" in ours:
        try:
            profiles.budget(options.tee_profile, options.memory_budget, 0)
        except ValueError as error:
            parser.error(str(error))


def _check_planes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.planes = ("grpc", "stream") if options.data_plane == "both" else (options.data_plane,)
    if options.work and len(options.planes) > 1:
        parser.error(f"--data-plane both does not go with {options.work}")
    if options.fhe and (options.pad_bank or options.switch_us or options.data_plane != "grpc"):
        parser.error("--fhe is of one linear in one process: there is no bank, no switch and no plane")


def _rows(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.budget_curve and (others := [name for name in options.schemes if name not in INSIDE]):
        parser.error(f"{', '.join(others)} keeps no cache in the budget: a curve is of {', '.join(INSIDE)}")
    if options.budget_curve:
        if len(options.context) > 1 or len(options.batch) > 1:
            parser.error("a curve has one --context and one --batch; --long-context is a second one")
        options.context, options.batch = options.context[0], options.batch[0]
    rows = [
        row for row in (*ROWS, *LIBRARY_ROWS) if row[0] in options.schemes and options.precision in (row[1], "both")
    ]
    missing = set(options.schemes) - {scheme for scheme, _ in rows}
    if missing and options.named:
        parser.error(f"{', '.join(sorted(missing))} cannot run at --precision {options.precision}")
    if not options.work and ("secure-infer", "int8") not in rows:
        for flag, given in (("--prefill worker", options.prefill == "worker"), ("--projections", options.projections)):
            if given:
                parser.error(f"{flag} is of secure-infer, which is not among the rows")
    return rows


def _schemes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in BENCHED:
            raise argparse.ArgumentTypeError(f"there is no scheme {name!r}; there are {', '.join(BENCHED)}")
    return names


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def _integers(low: int, high: int) -> Callable[[str], tuple[int, ...]]:
    one = _integer(low, high)
    return lambda text: tuple(sorted({one(part) for part in text.split(",")}))


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KiB|MiB|GiB)", text)
    if not match:
        raise argparse.ArgumentTypeError("must be a size: 65536KiB, 64MiB or 1GiB")
    return int(match[1]) << {"KiB": 10, "MiB": 20, "GiB": 30}[match[2]]


def _budgets(text: str) -> list[int]:
    sizes = {PROFILES[name].bytes if name in PROFILES else _size(name) for name in text.split(",")}
    if 0 in sizes:
        raise argparse.ArgumentTypeError("a budget has a size: that of cvm is what you give it, so write the number")
    return sorted(sizes)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 10_000:
        raise argparse.ArgumentTypeError("must be a number from 0.1 to 10000")
    return value
