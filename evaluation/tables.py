"""What cleave-bench prints for people: Markdown."""

from typing import Any

_COLUMNS = (
    "scheme",
    "precision",
    "ms/token",
    "(least to most)",
    "tokens/s",
    "of plain",
    "first token, ms",
    "exchanges/token",
    "KiB/token",
    "CPU ms/token: client",
    "trusted worker",
    "GPU worker",
    "time in worker / exchange / trusted, %",
    "pads, ms/token",
    "inside",
)


def bench_table(result: dict[str, Any]) -> str:
    """The rows, under a line that says what they are."""
    what = (
        f"{result['model']}, prompt {result['context']}, {result['tokens']} tokens decoded, batch {result['batch']}, "
        f"median of {result['repeat']} ({result['interleaved']})"
    )
    lines = [_line(_COLUMNS), "|---" * len(_COLUMNS) + "|", *(_line(_cells(row)) for row in result["rows"])]
    return "\n".join([what, result["machine"], "", *lines])


def soak_table(result: dict[str, Any]) -> str:
    """One section for each scheme."""
    what = f"{result['model']}, {result['clients']} clients, {result['minutes']:g} minutes, seed {result['seed']}"
    return "\n".join([what, result["machine"], *(line for one in result["soaks"] for line in _soak(one))])


def _cells(row: dict[str, Any]) -> list[str]:
    least, most = row["ms_per_token_spread"]
    cpu, shares, pad = row["cpu_seconds_per_token"], row["shares"], row["pad_seconds_per_token"]
    return [
        row["scheme"],
        row["precision"],
        f"{row['ms_per_token']:.2f}",
        f"{least:.2f} to {most:.2f}",
        f"{row['tokens_per_second']:.1f}",
        "-" if row["of_plain"] is None else f"{row['of_plain']:.2f}",
        f"{1000 * row['time_to_first_token']:.0f}",
        f"{row['exchanges_per_token']:.1f}",
        f"{row['bytes_per_token'] / 1024:.0f}",
        *(f"{1000 * cpu[role]:.1f}" if role in cpu else "-" for role in ("client", "trusted_worker", "gpu_worker")),
        "-"
        if shares is None
        else " / ".join(f"{100 * shares[part]:.0f}" for part in ("worker", "exchange", "trusted")),
        "-" if pad is None else f"{1000 * pad:.1f}",
        f"{row['products_inside']}",
    ]


def _soak(one: dict[str, Any]) -> list[str]:
    lines = ["", f"{one['scheme']} {one['precision']}: {'FAILED' if one['problems'] else 'passed'}", ""]
    lines += [f"- {one['completed']} answers completed, {one['wrong']} wrong, {one['left']} left by their client"]
    lines += [f"- failed: {_counts(one['failed'])}", f"- faults: {_counts(one['faults'])}"]
    lines += [
        f"- {role}: {growth['early'] >> 20} MiB early, {growth['late'] >> 20} MiB late, at most {growth['most'] >> 20}"
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


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
