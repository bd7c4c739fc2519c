"""`cleave-bench`: the protected scheme beside its baselines, in one run, on one machine, over real processes.

For each scheme and precision: a cluster of its own, one answer that warms everything up, then `--repeat` answers of
`--tokens` tokens to the same random prompt, greedy, each in a fresh session. Figures are medians. Speeds are decode
rates as a client sees them; pads are made before each answer, so secure-infer is measured with pads in stock (online),
and the time that making them took is printed beside it (offline, same cores).
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from client.attestation.policy import Policy
from client.session import Request, TrustedWorker, connect
from client.terminal import Progress, quiet
from client.turn import Pacing
from deploy.local.cluster import Cluster, Settings
from wire.errors import CleaveError
from wire.model_config import ModelConfig

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
ROWS = (
    ("plain", "float32"),
    ("plain", "int8"),
    ("kv-shield", "float32"),
    ("split", "float32"),
    ("split", "int8"),
    ("tee-only", "float32"),
    ("tee-only", "int8"),
    ("secure-infer", "int8"),
)
PAD_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    """One scheme at one precision. Times in seconds, sizes in bytes; per token means per decoded token."""

    scheme: str
    precision: str
    tokens_per_second: float
    time_to_first_token: float
    exchanges_per_token: float
    bytes_per_token: float
    pad_seconds_per_token: float
    products_inside: int
    memory_peak: int
    of_plain: float | None = None  # speed relative to plain at the same precision


@dataclass(frozen=True)
class Sample:
    """One answer."""

    first: float
    rate: float
    exchanges: int
    transferred: int
    inside: int


def main() -> None:
    """Run the bench and print a table, or one JSON object with --json."""
    options = _parse()
    try:
        rows = _relative([_measure(options, scheme, precision) for scheme, precision in _chosen(options)])
    except CleaveError as error:
        print(f"cleave-bench: {error}", file=sys.stderr)
        sys.exit(1)
    if options.json:
        print(json.dumps({"machine": machine(), "command": sys.argv[1:], "rows": [asdict(row) for row in rows]}))
        return
    print(f"{options.model.name}, prompt {options.prompt_tokens}, {options.tokens} tokens, median of {options.repeat}")
    print(machine(), end="\n\n")
    print(markdown(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="cleave-bench", description="Every scheme beside its baselines, in one run."
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, metavar="DIR", help="default: the demo model")
    add("--scheme", action="append", metavar="S", help="only this scheme; repeatable")
    add("--prompt-tokens", type=int, default=32)
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--repeat", type=int, default=3)
    add("--memory-budget", default="64MiB")
    add("--pad-bank", default="64MiB")
    add("--json", action="store_true")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [row for row in ROWS if not options.scheme or row[0] in options.scheme]


def _measure(options: argparse.Namespace, scheme: str, precision: str) -> Row:
    config = ModelConfig.from_hf(options.model)
    pick = random.Random(0)  # noqa: S311  (a fixed prompt)
    prompt = [pick.randrange(config.vocabulary) for _ in range(options.prompt_tokens)]
    settings = Settings(options.model, scheme, precision, options.memory_budget, options.pad_bank)
    request = Request(config.name, scheme, precision, max_context=options.prompt_tokens + options.tokens)
    progress = Progress(sys.stderr)
    with Cluster(settings, progress) as cluster, connect(cluster.target, Policy()) as worker:
        progress(f"measuring {scheme} {precision}", 0)
        _answer(worker, request, prompt, options.tokens)
        samples, waits = [], []
        for _ in range(options.repeat):
            waits.append(worker.await_pads(2 * options.tokens, PAD_SECONDS, quiet))
            samples.append(_answer(worker, request, prompt, options.tokens))
        peak = worker.counters().memory_peak
    progress.clear()
    count = options.tokens + options.prompt_tokens
    return Row(
        scheme,
        precision,
        statistics.median(sample.rate for sample in samples),
        statistics.median(sample.first for sample in samples),
        statistics.median(sample.exchanges for sample in samples) / count,
        statistics.median(sample.transferred for sample in samples) / count,
        statistics.median(waits) / options.tokens,
        samples[-1].inside,
        peak,
    )


def _answer(worker: TrustedWorker, request: Request, prompt: list[int], tokens: int) -> Sample:
    """One answer in a session of its own; end-of-sequence tokens do not end it early, a second turn goes on."""
    session = worker.open(request)
    before, times = worker.counters(), list[float]()
    started = time.monotonic()
    ids = prompt
    try:
        while len(times) < tokens:
            for _ in session.turn(ids, Pacing(max_new_tokens=tokens - len(times))):
                times.append(time.monotonic())
            if len(session.context) >= len(prompt) + tokens:
                break
            ids = [prompt[0]]
    finally:
        session.close()
    after = worker.counters()
    return Sample(
        times[0] - started,
        (len(times) - 1) / (times[-1] - times[0]),
        after.exchanges - before.exchanges,
        after.wire_bytes_up + after.wire_bytes_down - before.wire_bytes_up - before.wire_bytes_down,
        after.products_inside - before.products_inside,
    )


def _relative(rows: list[Row]) -> list[Row]:
    """The same rows with their speed relative to plain at the same precision."""
    plain = {row.precision: row.tokens_per_second for row in rows if row.scheme == "plain"}
    return [
        Row(**{**asdict(row), "of_plain": row.tokens_per_second / plain[row.precision]})
        if row.precision in plain
        else row
        for row in rows
    ]


def machine() -> str:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {model}, Python {platform.python_version()}"


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| scheme | precision | tokens/s | of plain | first token, ms | exchanges/token | KiB/token | pads, ms/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        relative = f"{row.of_plain:.2f}" if row.of_plain else "-"
        lines.append(
            f"| {row.scheme} | {row.precision} | {row.tokens_per_second:.1f} | {relative} "
            f"| {1000 * row.time_to_first_token:.0f} | {row.exchanges_per_token:.1f} "
            f"| {row.bytes_per_token / 1024:.0f} | {1000 * row.pad_seconds_per_token:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
