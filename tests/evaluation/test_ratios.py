"""Ratios are of pairs that were taken in the same turn."""

import pytest

from evaluation.measure import Load, Sample
from evaluation.ratios import as_dicts, ratios
from evaluation.rounds import Found, Key, Taken
from tests.evaluation.samples import sample

SHORT, LONG = Load(8, 10, 2), Load(99, 10, 2)
PLAIN, STREAM = Key("plain", "int8", "grpc"), Key("plain", "int8", "stream")
MASKED, OTHER = Key("secure-infer", "int8", "stream"), Key("secure-infer", "int8", "grpc")
LIBRARY = Key("transformers", "int8", "-")


def taken(*gaps: float, first: float = 1.0) -> Taken:
    samples: list[Sample] = [sample([gap, gap], first=first) for gap in gaps]
    return Taken(samples)


def test_a_ratio_is_the_median_of_those_of_the_repetitions_not_that_of_the_medians() -> None:
    found: Found = {(STREAM, SHORT): taken(0.01, 0.02, 0.03, first=0.5), (MASKED, SHORT): taken(0.02, 0.08, 0.03)}
    (one,) = ratios(found)
    assert (one.row, one.baseline, one.context, one.batch) == ("secure-infer int8 stream", "plain int8 stream", 8, 2)
    assert one.speed == pytest.approx(0.5)
    assert one.speed_spread == pytest.approx([0.25, 1])
    assert one.first_token == pytest.approx(2)


def test_pairs_have_the_same_load_and_the_same_plane_or_none() -> None:
    keys = (PLAIN, STREAM, MASKED, OTHER, LIBRARY)
    found: Found = {(key, load): taken(0.01) for key in keys for load in (SHORT, LONG)}
    names = [(one.row, one.baseline, one.context) for one in ratios(found)]
    pairs = [
        ("secure-infer int8 stream", "plain int8 stream"),
        ("secure-infer int8 grpc", "plain int8 grpc"),
        ("plain int8 grpc", "transformers int8"),
        ("plain int8 stream", "transformers int8"),
    ]
    assert names == [(*pair, context) for context in (8, 99) for pair in pairs]


def test_json_has_every_figure() -> None:
    found = ratios({(STREAM, SHORT): taken(0.01), (MASKED, SHORT): taken(0.01)})
    names = {"row", "baseline", "context", "batch", "speed", "speed_spread", "first_token"}
    assert [set(one) for one in as_dicts(found)] == [names]
