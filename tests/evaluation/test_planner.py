"""From flags to what is started; nothing is."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluation import flags, planner, reference
from evaluation.measure import Load
from evaluation.planner import Plan, Planner, budget_flag, worker_flags
from evaluation.rounds import Key
from wire.errors import ExhaustedError

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


def plan(*arguments: str) -> Plan:
    options = flags.parse(list(arguments))
    loads = [Load(context, options.tokens, batch) for batch in options.batch for context in options.context]
    return Planner(options, DEMO, loads, lambda *_: None).plan()


def settings(start: Any) -> Any:
    return start.args[0]


def test_rows_that_exchange_run_over_every_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "missing", lambda: None)
    schemes = ("--schemes", "plain,tee-only,transformers", "--precision", "int8")
    found = plan(*schemes, "--data-plane", "both")
    assert list(found.starts) == [
        Key("plain", "int8", "grpc"),
        Key("plain", "int8", "stream"),
        Key("tee-only", "int8", "-"),
        Key("transformers", "int8", "-"),
    ]
    grpc, stream, *_ = (settings(start).more for start in list(found.starts.values())[:3])
    assert "--data-plane" not in grpc
    assert stream[:2] == ("--data-plane", "stream")
    assert found.notes == []
    assert found.together


def test_without_the_library_its_rows_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "missing", lambda: "it is not here")
    found = plan("--schemes", "plain,transformers", "--precision", "both")
    assert [key.scheme for key in found.starts] == ["plain", "plain"]
    assert found.notes == ["it is not here"]
    assert plan("--schemes", "plain").notes == []


def test_pads_for_prompts_are_asked_for_and_have_room() -> None:
    usual, more = (
        settings(next(iter(plan("--schemes", "secure-infer", "--context", "256", *flag).starts.values())))
        for flag in ([], ["--prefill", "worker"])
    )
    assert usual.more[-2:] == ("--prefill", "auto")
    assert more.more[-2:] == ("--prefill", "worker")
    assert int(more.pad_bank) > int(usual.pad_bank)


def test_projections_are_those_of_secure_infer_alone() -> None:
    found = plan("--schemes", "plain,secure-infer", "--precision", "int8", "--projections", "trusted")
    plain, masked = (settings(start).more for start in found.starts.values())
    assert "--projections" not in plain
    assert masked[-2:] == ("--projections", "trusted")


def test_pads_that_the_disk_cannot_hold_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1 << 20))
    with pytest.raises(ExhaustedError, match="the banks of pads would take"):
        plan("--schemes", "secure-infer", "--context", "256", "--prefill", "worker")


def test_what_does_not_fit_together_is_started_anew_for_every_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "available_bytes", lambda: 1 << 30)
    assert not plan("--schemes", "plain").together
    monkeypatch.setattr(planner, "available_bytes", lambda: 1 << 40)
    assert plan("--schemes", "plain").together
    assert not plan("--schemes", "plain", "--one-at-a-time").together


def test_a_profile_says_the_budget_itself() -> None:
    given = flags.parse(["--tee-profile", "optee", "--switch-us", "7"])
    assert budget_flag(given, 5) is None
    assert worker_flags(given, "grpc") == ("--tee-profile", "optee", "--switch-us", "7")
    assert budget_flag(flags.parse([]), 5) == "5"
    assert budget_flag(flags.parse(["--memory-budget", "1MiB"]), 5) == str(1 << 20)
