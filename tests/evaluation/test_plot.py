"""The picture of a budget curve: it is drawn, from the same figures as the table, and only when it was asked for."""

from pathlib import Path
from typing import Any

import pytest

from evaluation import plot
from wire.errors import PreconditionError

MIB = 1 << 20


def speed(digests: str, context: int, rate: float) -> dict[str, Any]:
    rates = {"tokens_per_second": rate, "tokens_per_second_spread": [rate - 1, rate + 1]}
    return {"digests": digests, "context": context, **rates}


def point(scheme: str, budget: int, speeds: list[dict[str, Any]], precision: str = "int8") -> dict[str, Any]:
    contexts = {"context_inside": 64 * budget, "context_admitted": 8192}
    what = {"scheme": scheme, "precision": precision, "budget": budget * MIB, **contexts}
    return what | {"error": None if speeds else "too small", "speeds": speeds}


def result(*points: dict[str, Any], long: int | None = None) -> dict[str, Any]:
    return {"model": "demo", "machine": "m", "context": 32, "long_context": long, "points": list(points)}


CURVE = (
    point("tee-only", 14, [speed("on", 32, 5), speed("off", 32, 6), speed("on", 900, 3), speed("off", 900, 4)]),
    point("secure-infer", 14, []),
    point("tee-only", 64, [speed("none", 32, 9), speed("none", 900, 8)]),
    point("secure-infer", 64, [speed("none", 32, 20), speed("on", 900, 11), speed("off", 900, 12)]),
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draw, and give back the figure."""
    figure = pytest.importorskip("matplotlib.figure")
    made = []

    class Kept(figure.Figure):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)

    def run(found: dict[str, Any]) -> Any:
        plot.draw(found, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        return made[-1]

    return run


def lines(axes: Any) -> dict[str, Any]:
    """Budgets and heights of each line, by its name."""
    handles, names = axes.get_legend_handles_labels()
    plain = [getattr(handle, "lines", (handle,))[0] for handle in handles]  # those with error bars are containers
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in zip(names, plain, strict=True)}


def test_every_kind_of_speed_has_its_line(drawn: Any) -> None:
    speeds = drawn(result(*CURVE, long=900)).axes[0]
    found = lines(speeds)
    assert found["tee-only int8"] == ([14, 64], [5, 9])
    assert found["tee-only int8, digests of tiles unchecked"] == ([14, 64], [6, 9])
    assert found["tee-only int8, 900 tokens of prompt"] == ([14, 64], [3, 8])
    assert found["secure-infer int8"] == ([64], [20])
    assert found["secure-infer int8, 900 tokens of prompt"] == ([64], [11])
    assert found["secure-infer int8 does not run"][0] == [14]


def test_contexts_are_those_of_the_budgets_that_run(drawn: Any) -> None:
    contexts = drawn(result(*CURVE, long=900)).axes[1]
    found = lines(contexts)
    assert found["tee-only int8, inside the budget"] == ([14, 64], [14 * 64, 64 * 64])
    assert found["secure-infer int8, with pages parked, sealed"] == ([64], [8192])


def test_profiles_between_the_budgets_are_named(drawn: Any) -> None:
    speeds = drawn(result(*CURVE)).axes[0]
    assert [tick.get_text() for tick in speeds.child_axes[0].get_xticklabels()] == [
        "optee",
        "optee-rpi3",
        "qsee",
        "trustzone",
    ]
    assert [tick.get_text() for tick in speeds.get_xticklabels()] == ["14", "64"]


def test_one_budget_and_one_refusal_can_be_drawn_and_every_row_has_its_own_look(drawn: Any) -> None:
    drawn(result(point("tee-only", 14, [])))
    drawn(result(*(point(scheme, 24, [speed("none", 32, 5)], precision) for scheme, precision in plot.LOOKS)))
    assert len(set(plot.LOOKS.values())) == len(plot.LOOKS)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(PreconditionError, match="cannot be written"):
        plot.draw(result(*CURVE), tmp_path / "a.png")
