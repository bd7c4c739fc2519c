"""The picture of the matrix: `cleave-leakage --plot FILE.png`. Red is recovered, blue is chance, grey was not run."""

from pathlib import Path
from typing import Any

import numpy as np

from evaluation import pictures
from evaluation.leakage.cells import BROKEN, CHANCE, DESIGN, NOT_RUN
from evaluation.leakage.report import best, ordered, schemes

RED_TO_BLUE = "RdYlBu_r"
BROKEN_LEAST = 0.85
HATCH = "////"  # over what every scheme shows


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of what --json prints. Raises PreconditionError when it cannot be written."""
    offered, broken = schemes(result)
    rows, attacks = [*offered, *broken], ordered(result, "attack")
    shares = np.full((len(rows), len(attacks)), np.nan)
    figure = pictures.blank(2.6 + 0.62 * len(attacks), 2.2 + 0.36 * len(rows))
    axes = figure.subplots()
    for y, scheme in enumerate(rows):
        for x, attack in enumerate(attacks):
            cell = best(result, scheme, attack)
            if cell is None or cell["verdict"] == NOT_RUN:
                continue
            shares[y, x] = above_chance(cell)
            light = "white" if not 0.2 < shares[y, x] < 0.8 else "black"
            axes.text(x, y, _share(cell), ha="center", va="center", fontsize=7, color=light, zorder=3)
            if cell["verdict"] == DESIGN:
                axes.fill_between(
                    (x - 0.5, x + 0.5), y - 0.5, y + 0.5, facecolor="none", hatch=HATCH, edgecolor="white"
                )
    axes.set_facecolor("lightgrey")
    axes.imshow(shares, cmap=RED_TO_BLUE, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.axhline(len(offered) - 0.5, color="black", linewidth=3)
    axes.set_title(
        f"{result['model']}: what each attack recovers at best\n"
        "red: all of it; blue: no more than chance; grey: nothing for it is sent; hatched: shown by design;\n"
        "below the line: broken on purpose",
        fontsize=9,
    )
    pictures.save(figure, path)


def above_chance(cell: dict[str, Any]) -> float:
    """0 for no more than chance, 1 for everything; what is broken at all is at least BROKEN_LEAST."""
    if cell["verdict"] == CHANCE:
        return 0.0
    share: float = (cell["estimate"] - cell["chance"]) / (1 - cell["chance"]) if cell["chance"] < 1 else 0.0
    return min(max(share, BROKEN_LEAST), 1.0)


def _share(cell: dict[str, Any]) -> str:
    """In two digits; small ones that broke a scheme, as a count."""
    small = cell["verdict"] == BROKEN and cell["estimate"] < 0.01
    return str(cell["hits"]) if small else f"{cell['estimate']:.2f}"
