"""What cleave-bench prints for people: Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from client.terminal import size

_CURVE_COLUMNS = (
    "budget",
    "TEE profiles",
    "scheme",
    "precision",
    "weights",
    "embedding",
    "digests of tiles",
    "prompt",
    "tokens/s",
    "(least to most)",
    "first token, ms",
    "tiles/token",
    "table scans/token",
    "tiles/prompt",
    "table scans/prompt",
    "KV pages restored/token",
    "pads in stock",
    "CPU ms/pad",
    "inside",
    "context inside the budget",
    "longest context",
    "peak",
)

_EXTRACTION_COLUMNS = ("attacker", "token match", "95 %", "the student alone", "rows recorded", "conversations read")
_PLANES = {"stream": "over the stream socket", "both": "over gRPC and the stream socket"}  # where it is not gRPC alone


def curve_table(result: dict[str, Any]) -> str:
    """A row for every budget, scheme, prompt, and way to treat digests; and what could not run, below."""
    what = f"{result['model']}, {result['tokens']} tokens decoded, batch {result['batch']}"
    what += f", median of {result['repeat']}" + ("; long prompts: once" if result["long_context"] else "")
    rows = [cells for point in result["points"] for cells in _point(point)]
    errors = [f"- {_which(point)}: {point['error']}" for point in result["points"] if point["error"]]
    return "\n".join([*head(what, result), "", *table(_CURVE_COLUMNS, rows), *([""] if errors else []), *errors])


def soak_table(result: dict[str, Any]) -> str:
    """One section for each scheme."""
    what = f"{result['model']}, {result['clients']} clients, {result['minutes']:g} minutes, seed {result['seed']}"
    return "\n".join([*head(what, result), *(line for one in result["soaks"] for line in _soak(one))])


def extraction_table(result: dict[str, Any]) -> str:
    """A row for each attacker, under a line that says what a token match is."""
    what = f"{result['model']} with the adapter {result['adapter']}, {result['prompts']} conversations recorded"
    what += f", tokens of the adapted model's answers to {result['tested']} other questions that an attacker would say"
    rows = [_attacker(score) for score in result["scores"]]
    return "\n".join([f"{what}, too", result["machine"], "", *table(_EXTRACTION_COLUMNS, rows)])


def _attacker(score: dict[str, Any]) -> list[str]:
    alone = "-" if score["student"] is None else f"{100 * score['student']:.1f} %"
    interval = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
    counts = [str(score[name] or "-") for name in ("rows", "conversations")]
    return [score["attacker"], f"{100 * score['match']:.1f} %", interval, alone, *counts]


def head(what: str, result: dict[str, Any]) -> list[str]:
    """The lines above a table: what was measured, and on what."""
    profile = [f"in {result['tee_profile']}"] if result["tee_profile"] else []
    charged = [f"{result['switch_us']} us charged for each exchange"] if result["switch_us"] else []
    plane = [_PLANES[result["data_plane"]]] if result["data_plane"] in _PLANES else []
    return [", ".join([what, *profile, *plane, *charged]), result["machine"]]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]


def _which(point: dict[str, Any]) -> str:
    return f"{point['scheme']} {point['precision']} in {_budget(point['budget'])}"


def _budget(count: int) -> str:
    return size(count).replace(".0 ", " ")


def _point(point: dict[str, Any]) -> list[list[str]]:
    """One row for each speed; one without figures if there are none."""
    start = [_budget(point["budget"]), ", ".join(point["profiles"]) or "-", point["scheme"], point["precision"]]
    if point["error"]:
        why = "failed" if point["failed"] else f"too small: {size(point['least'])} would do"
        return [[*start, *(why if column == "tokens/s" else "-" for column in _CURVE_COLUMNS[len(start) :])]]
    end = [str(point["context_inside"]), str(point["context_admitted"]), size(point["memory_peak"])]
    return [[*start, point["weights"], point["embedding"], *_speed(speed), *end] for speed in point["speeds"]]


def _speed(speed: dict[str, Any]) -> list[str]:
    least, most = speed["tokens_per_second_spread"]
    counts = ("tiles_per_token", "scans_per_token", "tiles_per_prompt", "scans_per_prompt", "pages_restored_per_token")
    pad = speed["seconds_per_pad"]
    return [
        speed["digests"],
        str(speed["context"]),
        f"{speed['tokens_per_second']:.2f}",
        f"{least:.2f} to {most:.2f}",
        f"{1000 * speed['time_to_first_token']:.0f}",
        *(f"{speed[name]:.1f}" if speed[name] else "-" for name in counts),
        str(speed["pads_in_stock"] or "-"),
        "-" if pad is None else f"{1000 * pad:.1f}",
        str(speed["products_inside"]),
    ]


def _soak(one: dict[str, Any]) -> list[str]:
    lines = ["", f"{one['scheme']} {one['precision']}: {'FAILED' if one['problems'] else 'passed'}", ""]
    lines += [f"- {one['completed']} answers completed, {one['wrong']} wrong, {one['left']} left by their client"]
    lines += [f"- failed: {_counts(one['failed'])}", f"- faults: {_counts(one['faults'])}"]
    lines += [
        f"- {role}: {growth['early'] >> 20} MiB early, {growth['late'] >> 20} MiB late "
        f"({growth['limit'] >> 20} allowed), at most {growth['most'] >> 20}"
        if growth
        else f"- {role}: too few samples of its memory"
        for role, growth in one["rss"].items()
    ]
    verified, inside = one["products_verified"], one["products_inside"]
    lines += [f"- products: {verified} verified, {one['products_failed']} rejected, {inside} inside"]
    lines += [f"- pads reused: {one['pads_reused']}"]
    return lines + [f"- PROBLEM: {problem}" for problem in one["problems"]]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())) or "none"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
