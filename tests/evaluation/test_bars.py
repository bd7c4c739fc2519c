"""The chart of the bench: bars, rooflines and sustained speeds are where the figures say."""

from pathlib import Path
from typing import Any

import pytest

from evaluation import bars, pictures
from tests.evaluation.samples import bench_result, bench_row, roofline

ROWS = (
    bench_row("plain", "int8", "stream", 50, roofline=roofline(0.016)),
    bench_row("secure-infer", "int8", "stream", 25),
    bench_row("transformers", "int8", "-", 10, roofline=roofline(0.001)),
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draw, and give back the figure."""
    pytest.importorskip("matplotlib")
    made: list[Any] = []
    blank = pictures.blank

    def keep(width: float, height: float) -> Any:
        made.append(blank(width, height))
        return made[-1]

    monkeypatch.setattr(pictures, "blank", keep)

    def run(*rows: dict[str, Any]) -> Any:
        bars.draw(bench_result(*rows), tmp_path / "bench.png")
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
        return made[-1]

    return run


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_every_row_has_a_bar_with_its_name_and_speed(drawn: Any) -> None:
    (axes,) = drawn(*ROWS).axes
    assert [bar.get_width() for bar in axes.patches[:3]] == [50, 25, 10]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["plain int8 stream  50.0", "secure-infer int8 stream  25.0", "transformers int8  10.0"]


def test_pads_make_a_second_bar_within(drawn: Any) -> None:
    (axes,) = drawn(*ROWS).axes
    (second,) = axes.patches[3:]
    assert (second.get_width(), second.get_hatch()) == (12.5, "///")


def test_rooflines_are_lines_or_arrows_when_they_are_far(drawn: Any) -> None:
    (axes,) = drawn(*ROWS).axes
    found = lines(axes)
    assert found["roofline"] == ([62.5], [0])
    assert found["roofline, further right"][1] == [2]
    assert [text.get_text() for text in axes.texts] == ["1000"]


def test_every_load_has_a_panel(drawn: Any) -> None:
    more = [bench_row("plain", "int8", "grpc", 5, context=context) for context in (64, 128, 256)]
    figure = drawn(*ROWS, *more)
    seen = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in seen][:2] == ["prompt of 32, batch 1", "prompt of 64, batch 1"]
    assert len(seen) == 4


def test_every_scheme_has_a_colour_of_its_own(drawn: Any) -> None:
    drawn(*(bench_row(scheme, "int8", "grpc", 5) for scheme in bars.COLOURS))
    assert len(set(bars.COLOURS.values())) == len(bars.COLOURS)
