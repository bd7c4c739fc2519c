"""Points of a budget curve, with meters that only write down what happens to them; and what is printed of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from evaluation.curve import Meter, Place, Point, Trial, as_dicts, measure_point, speed
from evaluation.measure import Load, Sample
from evaluation.refill import Refill
from evaluation.tables import curve_table
from tests.evaluation.samples import ZERO, sample
from wire.errors import CleaveError, UnavailableError

PLACE = Place("tee-only", "int8", 14 << 20, least=2 << 20)
TRIAL = Trial(Load(32, 10, 1), repeat=2)
LONG = replace(TRIAL, long=Load(900, 10, 1))
SEEN: dict[str, Any] = {"embedding": "scan", "kv_pages_capacity": 39, "memory_peak": 14 << 20, "spill_bytes": 5}


class Fake:
    """A meter that reads `tiles` tiles in every repetition; `diary` is everybody's."""

    def __init__(self, checked: bool, diary: list[str], tiles: int, error: CleaveError | None) -> None:
        self._name, self._diary, self._tiles, self._error = "on" if checked else "off", diary, tiles, error

    def repeat(self, load: Load) -> Sample:
        if self._error:
            raise self._error
        self._diary.append(self._name if load == TRIAL.load else f"{self._name} {load.context}")
        gap = 0.001 * len(self._diary)
        return sample([gap], tiles_read=self._tiles, tiles_unchecked=self._name == "off", **SEEN)

    def admitted(self) -> int:
        return 1024


def starts(
    diary: list[str], tiles: int = 0, error: CleaveError | None = None
) -> Callable[[bool], AbstractContextManager[Meter]]:
    @contextmanager
    def run(checked: bool) -> Iterator[Meter]:
        diary.append(f"+{checked}")
        try:
            yield Fake(checked, diary, tiles, error)
        finally:
            diary.append(f"-{checked}")

    return run


def streamed() -> Point:
    return measure_point(PLACE, 6, starts([], tiles=30), LONG)


def refused() -> Point:
    place = replace(PLACE, scheme="secure-infer", least=15 << 20)
    return measure_point(place, 6, starts([], error=UnavailableError("it\nstopped")), TRIAL)


def test_a_point_without_tiles_is_measured_on_one_cluster() -> None:
    diary: list[str] = []
    point = measure_point(PLACE, 6, starts(diary), TRIAL)
    assert diary == ["+True", "on", "on", "-True"]
    assert [one.digests for one in point.speeds] == ["none"]
    assert (point.profiles, point.error, point.failed) == (["optee"], None, False)
    assert (point.context_inside, point.context_admitted) == (39 // 6 * 64, 1024)
    assert (point.weights, point.embedding, point.memory_peak, point.spilled) == ("streamed", "scan", 14 << 20, 5)


def test_tiles_are_measured_with_digests_and_without_in_turns() -> None:
    diary: list[str] = []
    point = measure_point(PLACE, 6, starts(diary, tiles=30), TRIAL)
    assert diary == ["+True", "on", "+False", "off", "on", "off", "-False", "-True"]
    assert [one.digests for one in point.speeds] == ["on", "off"]
    assert [one.tiles_per_token for one in point.speeds] == [3.0, 3.0]


def test_a_long_prompt_is_measured_once_on_each() -> None:
    diary: list[str] = []
    point = measure_point(PLACE, 6, starts(diary, tiles=30), LONG)
    assert diary[6:8] == ["on 900", "off 900"]
    assert [(one.context, one.digests, one.repeat) for one in point.speeds] == [
        (32, "on", 2),
        (32, "off", 2),
        (900, "on", 1),
        (900, "off", 1),
    ]


def test_resident_weights_are_said_to_be() -> None:
    @contextmanager
    def start(_: bool) -> Iterator[Meter]:
        yield Resident(True, [], 0, None)

    class Resident(Fake):
        def repeat(self, load: Load) -> Sample:
            found = super().repeat(load)
            return replace(found, after=replace(found.after, weights_resident=True))

    assert measure_point(PLACE, 6, start, TRIAL).weights == "resident"
    assert measure_point(replace(PLACE, scheme="split"), 6, start, TRIAL).weights == "absent"


def test_a_budget_that_is_too_small_is_a_point_and_no_failure() -> None:
    point = refused()
    assert (point.error, point.failed, point.speeds) == ("it stopped", False, ())


def test_a_budget_that_would_do_and_does_not_is_a_failure() -> None:
    diary: list[str] = []
    point = measure_point(PLACE, 6, starts(diary, error=UnavailableError("it stopped")), TRIAL)
    assert point.failed
    assert diary == ["+True", "-True"]


def test_speeds_are_medians_and_counts_are_means() -> None:
    prompts = (replace(ZERO, tiles_read=5), replace(ZERO, tiles_read=25, table_scans=2))
    samples = [
        replace(sample([gap, gap], first=gap), prompts=prompts, pad=Refill(pad, 9.0) if pad else None)
        for gap, pad in ((0.01, 0.5), (0.02, None), (0.05, 0.3))
    ]
    samples[1] = replace(samples[1], after=replace(ZERO, pages_restored=60, table_scans=30, products_inside=4))
    found = speed(7, samples)
    assert (found.context, found.repeat, found.time_to_first_token) == (7, 3, 0.02)
    assert found.tokens_per_second == pytest.approx(100)
    assert found.tokens_per_second_spread == pytest.approx([40, 200])
    assert (found.tiles_per_prompt, found.scans_per_prompt) == (20, 2)
    assert (found.pages_restored_per_token, found.scans_per_token) == (2, 1)
    assert found.seconds_per_pad == pytest.approx(0.4)
    assert (found.products_inside, found.pads_in_stock) == (4, 0)


def result(*points: Point) -> dict[str, object]:
    what = {"model": "demo", "machine": "m", "context": 32, "long_context": 900, "tokens": 10, "batch": 1, "repeat": 2}
    return what | {"tee_profile": "", "switch_us": 0, "data_plane": "grpc", "points": as_dicts(points)}


def test_json_has_the_keys_that_others_read() -> None:
    running, small = json.loads(json.dumps(as_dicts([streamed(), refused()])))
    keys = (
        "scheme precision budget profiles least error failed weights embedding context_inside context_admitted speeds"
    )
    assert set(keys.split()) <= set(running)
    assert {"digests", "context", "tokens_per_second", "tokens_per_second_spread"} <= set(running["speeds"][0])
    assert (small["speeds"], small["failed"]) == ([], False)


def test_the_table_has_a_line_for_every_speed_and_one_for_a_refusal() -> None:
    lines = curve_table(result(streamed(), refused())).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4 + 1
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| 14 MiB | optee | tee-only | int8 | streamed | scan | on | 32 |")
    assert "| too small: 15.0 MiB would do |" in table[6]
    assert lines[-1] == "- secure-infer int8 in 14 MiB: it stopped"


def test_what_was_charged_and_the_profile_stand_above_the_table() -> None:
    changed = result(streamed()) | {"switch_us": 20, "tee_profile": "optee", "data_plane": "stream"}
    assert (
        curve_table(changed)
        .splitlines()[0]
        .endswith(", in optee, over the stream socket, 20 us charged for each exchange")
    )
    assert "charged" not in curve_table(result(streamed()))
