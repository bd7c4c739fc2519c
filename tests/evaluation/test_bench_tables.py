"""What is printed of the rows: every figure in its place, and nothing where there is nothing."""

from evaluation.bench_tables import bench_table
from tests.evaluation.samples import bench_result, bench_row, roofline

RATES = {"threads": 2, "bytes_per_second": 20e9, "macs_per_second": {"float32": 50e9, "bfloat16": 99e9}}
TIMES = ("exchange_us", "exchange_p50_us", "exchange_p99_us", "bare_exchange_p50_us")
NOTHING = dict.fromkeys((*TIMES, "shares", "of_plain"))
ROWS = (
    bench_row("plain", "int8", "stream", 50, roofline=roofline(0.016)),
    bench_row("plain", "int8", "stream", 40, context=900, roofline=roofline(0.016)),
    bench_row("secure-infer", "int8", "stream", 25),
    bench_row("secure-infer", "int8", "stream", 20, context=900),
    bench_row("transformers", "bfloat16", "-", 10, **NOTHING),
)
RATIO = {"row": "a", "baseline": "b", "context": 32, "batch": 1, "speed": 0.5, "speed_spread": [0.4, 0.6]}


def sections(**more: object) -> list[list[str]]:
    """The lines of every table, by their order; all lines of a table have as many cells."""
    text = bench_table(bench_result(*ROWS, rates=RATES, ratios=[RATIO | {"first_token": 2.5}], **more))
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    return tables


def test_every_row_has_a_line_with_its_figures() -> None:
    rows = sections()[0]
    assert len(rows) == 2 + 5
    assert rows[4] == (
        "| secure-infer | int8 | stream | 32 | 1 | 40.00 | 36.00 to 44.00 | 25.0 | 0.50 | 200 | - | 25.0 | 120 "
        "| 110 | 340 | 95 | 2 | 25 / 50 / 25 | 3 + 40 |"
    )
    assert rows[6].startswith("| transformers | bfloat16 | - | 32 | 1 | 100.00 |")
    assert rows[6].endswith("| - | 200 | - | 25.0 | - | - | - | - | 2 | - | - |")


def test_online_and_sustained_stand_beside_each_other() -> None:
    pads = sections()[1]
    assert len(pads) == 2 + 2
    assert pads[2] == "| secure-infer | stream | 32 | 1 | 25.0 | 12.5 | 8.0 | 24.0 | 1.0 | 2.0 | 4.0 | 9.0 |"


def test_rooflines_are_those_of_rows_that_have_one() -> None:
    roofs = sections()[2]
    assert len(roofs) == 2 + 2
    assert roofs[2] == (
        "| plain | int8 | stream | 32 | 1 | 450 | 16.00 | 1.00 | 16.00 | 20.00 | 1.25 | 3.0 | 100 | 200 | 2.00 |"
    )


def test_ratios_and_contexts_have_tables_of_their_own() -> None:
    *_, ratios, contexts = sections()
    assert ratios[2] == "| a | b | 32 | 1 | 0.50 | 0.40 to 0.60 | 2.50 |"
    assert contexts[2:] == [
        "| plain | int8 | stream | 1 | 20.00 | 25.00 |",
        "| secure-infer | int8 | stream | 1 | 40.00 | 50.00 |",
        "| transformers | bfloat16 | - | 1 | 100.00 | - |",
    ]


def test_the_lines_above_say_what_was_measured_and_what_was_left_out() -> None:
    what = {"rates": RATES, "prefill": "worker", "projections": "trusted", "data_plane": "both"}
    text = bench_table(bench_result(ROWS[0], notes=["no library"], **what))
    assert text.splitlines()[:3] == [
        "demo, 10 tokens decoded, median of 3 (x), pads for all prompt rows, projections trusted, "
        "over gRPC and the stream socket",
        "m",
        "no library",
    ]
    assert "Rooflines: 20.0 GB/s read, products of float32 at 50 GMAC/s, of bfloat16 at 99 GMAC/s, 2 threads" in text


def test_what_was_not_measured_has_no_table() -> None:
    text = bench_table(bench_result(bench_row("plain", "int8", "grpc", 5)))
    assert text.count("\n| ") == 1 + 1
    assert "Rooflines" not in text
