"""The picture of a budget curve: what `cleave-bench --budget-curve --plot FILE.png` draws from the figures it prints.

Rows differ in their marker and by colours that the colour-blind can tell apart (Okabe and Ito). matplotlib is imported
when a picture is asked for, never before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import pictures
from wire.profiles import MIB, PROFILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = {  # colour, marker
    ("tee-only", "int8"): ("#0072B2", "o"),
    ("tee-only", "float32"): ("#56B4E9", "D"),
    ("secure-infer", "int8"): ("#D55E00", "s"),
    ("split", "int8"): ("#009E73", "^"),
    ("split", "float32"): ("#CC79A7", "v"),
}
GREY = "#555555"
CHECKED, UNCHECKED = ("on", "none"), ("off", "none")  # digests; where no tile is read, there is nothing to check

Points = list[dict[str, Any]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of what --json prints. Raises PreconditionError when it cannot be written."""
    figure = pictures.blank(13, 6)
    speeds, contexts = figure.subplots(1, 2)
    for number, row in enumerate(dict.fromkeys((one["scheme"], one["precision"]) for one in result["points"])):
        points = [one for one in result["points"] if (one["scheme"], one["precision"]) == row]
        _draw_speeds(speeds, points, result["long_context"])
        _draw_contexts(contexts, points)
        _draw_refusals(speeds, points, number)
    for axes in (speeds, contexts):
        _mark_budgets(axes, sorted({one["budget"] / MIB for one in result["points"]}))
        axes.grid(axis="y", alpha=0.3)
    _name_axes(speeds, f"decoding, {result['context']} tokens of prompt", "tokens per second, least to most")
    speeds.set_ylim(bottom=0)
    _name_axes(contexts, "longest context of one session", "tokens")
    if not all(one["error"] for one in result["points"]):  # a logarithmic axis cannot be empty
        contexts.set_yscale("log", base=2)
    contexts.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"{result['model']}: what a memory budget buys\n{result['machine']}", fontsize=10)
    pictures.save(figure, path)


def _draw_speeds(axes: "Axes", points: Points, long: int | None) -> None:
    _draw_line(axes, points, CHECKED, 0, _name(points), zorder=3)  # seen where digests make no difference
    if any(speed["digests"] == "off" for point in points for speed in point["speeds"]):
        look: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
        _draw_line(axes, points, UNCHECKED, 0, f"{_name(points)}, digests of tiles unchecked", **look)
    if long is not None:
        look = {"linestyle": ":", "markersize": 4}
        _draw_line(axes, points, CHECKED, -1, f"{_name(points)}, {long} tokens of prompt", **look)


def _draw_line(axes: "Axes", points: Points, digests: tuple[str, ...], which: int, name: str, **look: Any) -> None:
    """Of a point's speeds with such digests the first is behind the usual prompt, the last behind the long one."""
    found = [(one["budget"], [speed for speed in one["speeds"] if speed["digests"] in digests]) for one in points]
    budgets = [budget / MIB for budget, speeds in found if speeds]
    rates = [
        (speeds[which]["tokens_per_second"], *speeds[which]["tokens_per_second_spread"])
        for _, speeds in found
        if speeds
    ]
    bars = [[rate - low for rate, low, _ in rates], [high - rate for rate, _, high in rates]]
    style: dict[str, Any] = _look(points) | look
    axes.errorbar(budgets, [rate for rate, _, _ in rates], yerr=bars, capsize=3, label=name, **style)


def _draw_contexts(axes: "Axes", points: Points) -> None:
    running = [one for one in points if not one["error"]]
    budgets, look = [one["budget"] / MIB for one in running], _look(points)
    inside, admitted = ([one[name] for one in running] for name in ("context_inside", "context_admitted"))
    plain: dict[str, Any] = look
    parked: dict[str, Any] = look | {"linestyle": "--", "markerfacecolor": "white"}
    axes.plot(budgets, inside, label=f"{_name(points)}, inside the budget", **plain)
    axes.plot(budgets, admitted, label=f"{_name(points)}, with pages parked, sealed", **parked)


def _draw_refusals(axes: "Axes", points: Points, number: int) -> None:
    budgets = [one["budget"] / MIB for one in points if one["error"]]
    if budgets:
        style: dict[str, Any] = _look(points) | {"marker": "x", "markersize": 8, "linestyle": ""}
        height = [0.02 + 0.04 * number] * len(budgets)  # one row of crosses above the other
        axes.plot(budgets, height, transform=axes.get_xaxis_transform(), label=f"{_name(points)} does not run", **style)


def _mark_budgets(axes: "Axes", budgets: list[float]) -> None:
    """A logarithmic axis with the budgets that were measured; above, the profiles by their names."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets], fontsize=8, rotation=90)
    axes.set_xticks([], minor=True)
    seen = {name: one.bytes / MIB for name, one in PROFILES.items() if budgets[0] <= one.bytes / MIB <= budgets[-1]}
    for place in seen.values():
        axes.axvline(place, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    names = axes.secondary_xaxis("top")
    names.set_xticks(list(seen.values()), list(seen), fontsize=8, rotation=45, ha="left", rotation_mode="anchor")
    names.set_xticks([], minor=True)


def _name_axes(axes: "Axes", title: str, height: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("memory budget, MiB")
    axes.set_ylabel(height)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def _name(points: Points) -> str:
    return f"{points[0]['scheme']} {points[0]['precision']}"


def _look(points: Points) -> dict[str, str]:
    colour, marker = LOOKS[points[0]["scheme"], points[0]["precision"]]
    return {"color": colour, "marker": marker}
