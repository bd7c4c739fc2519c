"""The picture of the bench: what `cleave-bench --plot FILE.png` draws from the figures it prints.

A panel for each prompt and batch; a bar for each row, from the least to the most of its repetitions; a black line where
its roofline is; within the bar of secure-infer a hatched one, its sustained speed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {  # that the colour-blind can tell apart (Okabe and Ito)
    "plain": "#0072B2",
    "transformers": "#999999",
    "kv-shield": "#CC79A7",
    "split": "#009E73",
    "tee-only": "#56B4E9",
    "secure-infer": "#D55E00",
}
PALE = 0.45  # opacity
PANELS = 3  # beside each other
OFF = 2.5  # times the longest bar: how far a panel goes for a roofline

Rows = list[dict[str, Any]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of what --json prints. Raises PreconditionError when it cannot be written."""
    loads = list(dict.fromkeys((row["context"], row["batch"]) for row in result["rows"]))
    most = max(sum((row["context"], row["batch"]) == load for row in result["rows"]) for load in loads)
    across = min(PANELS, len(loads))
    down = -(-len(loads) // across)
    figure = pictures.blank(4 + 4.5 * across, down * (1.6 + 0.34 * most) + 0.8)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, load in zip(panels, loads, strict=False):
        _draw_panel(axes, [row for row in result["rows"] if (row["context"], row["batch"]) == load])
        axes.set_title(f"prompt of {load[0]}, batch {load[1]}", fontsize=10)
    for axes in list(figure.axes)[len(loads) :]:
        axes.set_visible(False)
    named = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{result['model']}: decoding, tokens per second of all sessions\n{result['machine']}", fontsize=10)
    pictures.save(figure, path)


def _draw_panel(axes: "Axes", rows: Rows) -> None:
    places = list(range(len(rows)))
    speeds = [row["tokens_per_second"] for row in rows]
    axes.barh(places, speeds, 0.7, color=[COLOURS[row["scheme"]] for row in rows], xerr=_errors(rows), capsize=2)
    _draw_sustained(axes, rows)
    _draw_rooflines(axes, rows, OFF * max(map(_fastest, rows)))
    axes.set_yticks(places, [f"{' '.join(_words(row))}  {row['tokens_per_second']:.1f}" for row in rows], fontsize=8)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_rooflines(axes: "Axes", rows: Rows, edge: float) -> None:
    """Those beyond the edge, which would make the bars too short to be seen, are arrows with a number."""
    roofs = [(roof, place) for place, row in enumerate(rows) if (roof := _roof(row))]
    look: dict[str, Any] = {"linestyle": "", "color": "black"}
    if near := [roof for roof in roofs if roof[0] <= edge]:
        axes.plot(*zip(*near, strict=True), marker="|", markersize=15, markeredgewidth=2, label="roofline", **look)
    if far := [roof for roof in roofs if roof[0] > edge]:
        axes.plot([edge] * len(far), [place for _, place in far], marker=">", label="roofline, further right", **look)
    for roof, place in far:
        axes.annotate(
            f"{roof:.0f}", (edge, place), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=8
        )


def _draw_sustained(axes: "Axes", rows: Rows) -> None:
    padded = [(place, row) for place, row in enumerate(rows) if row["pad_wall_seconds_per_token"]]
    if padded:
        speeds = [row["tokens_per_second_sustained"] for _, row in padded]
        style: dict[str, Any] = {"color": "white", "alpha": PALE, "hatch": "///", "edgecolor": "black"}
        axes.barh([place for place, _ in padded], speeds, 0.35, label="sustained: pads are made, too", **style)


def _errors(rows: Rows) -> list[list[float]]:
    """How far the slowest and the fastest repetition are from the median."""
    ends = [(row["tokens_per_second"], _slowest(row), _fastest(row)) for row in rows]
    return [[max(0.0, rate - low) for rate, low, _ in ends], [max(0.0, high - rate) for rate, _, high in ends]]


def _slowest(row: dict[str, Any]) -> float:
    return float(1000 * row["batch"] / row["ms_per_token_spread"][1])


def _fastest(row: dict[str, Any]) -> float:
    return float(1000 * row["batch"] / row["ms_per_token_spread"][0])


def _roof(row: dict[str, Any]) -> float | None:
    """Tokens per second of all sessions."""
    return row["batch"] / row["roofline"]["decode_seconds"] if row["roofline"] else None


def _words(row: dict[str, Any]) -> list[str]:
    return [row[name] for name in ("scheme", "precision", "plane") if row[name] != "-"]
