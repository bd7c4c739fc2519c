"""The command line of cleave-bench."""

import shlex
from pathlib import Path

import pytest

from evaluation import flags

BAD = {
    "an unknown scheme": (["--schemes", "plain,magic"], "no scheme 'magic'"),
    "a scheme without this precision": (["--schemes", "secure-infer", "--precision", "float32"], "secure-infer"),
    "an unknown precision": (["--precision", "int4"], "int4"),
    "one token": (["--tokens", "1"], "whole number from 2"),
    "no batch": (["--batch", "0"], "whole number from 1"),
    "half a repetition": (["--repeat", "0.5"], "whole number"),
    "a size without a unit": (["--pad-bank", "64"], "64MiB"),
    "the old flag": (["--scheme", "plain"], "--scheme"),
    "minutes without soak": (["--minutes", "3"], "--minutes needs --soak"),
    "tokens with soak": (["--soak", "--tokens", "3"], "--tokens does not go with --soak"),
    "one at a time with soak": (["--soak", "--one-at-a-time"], "--one-at-a-time does not go with --soak"),
    "no time": (["--soak", "--minutes", "0"], "0.1"),
    "a profile and a budget": (["--tee-profile", "optee", "--memory-budget", "20MiB"], "--tee-profile optee is 14 MiB"),
    "a profile without a size": (["--soak", "--tee-profile", "cvm"], "add --memory-budget"),
    "an unknown profile": (["--tee-profile", "moon"], "moon"),
    "too long a switch": (["--switch-us", "1000001"], "whole number from 0 to 1000000"),
    "budgets without a curve": (["--budgets", "14MiB"], "--budgets needs --budget-curve"),
    "a picture of a soak": (["--soak", "--plot", "a.png"], "--plot does not go with --soak"),
    "two contexts for a curve": (["--budget-curve", "--context", "8,9"], "a curve has one --context"),
    "a curve over both planes": (["--budget-curve", "--data-plane", "both"], "--data-plane both does not go with"),
    "a soak over both planes": (["--soak", "--data-plane", "both"], "--data-plane both does not go with --soak"),
    "a soak of the library": (["--soak", "--schemes", "transformers"], "it cannot be soaked"),
    "a curve of the library": (["--budget-curve", "--schemes", "transformers"], "transformers keeps no cache"),
    "half a list": (["--batch", "1,"], "whole number from 1"),
    "bfloat16 of a scheme": (["--schemes", "plain", "--precision", "bfloat16"], "plain cannot run"),
    "pads for prompts without pads": (["--schemes", "plain", "--prefill", "worker"], "is of secure-infer"),
    "projections of no masks": (["--schemes", "split", "--projections", "auto"], "--projections is of secure-infer"),
    "pads for prompts of a curve": (["--budget-curve", "--prefill", "worker"], "--prefill does not go with"),
    "a context of fhe": (["--fhe", "--context", "8"], "--context does not go with --fhe"),
    "a plane of fhe": (["--fhe", "--data-plane", "stream"], "--fhe is of one linear"),
    "fhe and a soak": (["--fhe", "--soak"], "--soak does not go with --fhe"),
    "one budget for a curve": (["--budget-curve", "--memory-budget", "2MiB"], "does not go with --budget-curve"),
    "one profile for a curve": (["--budget-curve", "--tee-profile", "optee"], "does not go with --budget-curve"),
    "a curve and a soak": (["--budget-curve", "--soak"], "--soak does not go with --budget-curve"),
    "a curve of a scheme without a budget": (["--budget-curve", "--schemes", "tee-only,plain"], "plain keeps no cache"),
    "a budget that is none": (["--budget-curve", "--budgets", "14MiB,lots"], "64MiB"),
    "a budget without a size": (["--budget-curve", "--budgets", "cvm"], "a budget has a size"),
    "prompts without an extraction": (["--prompts", "9"], "--prompts needs --extraction"),
    "tokens with an extraction": (["--extraction", "--tokens", "9"], "--tokens does not go with --extraction"),
    "an extraction and a soak": (["--extraction", "--soak"], "--soak does not go with --extraction"),
    "an extraction of another model": (["--extraction", "--model", "m"], "--extraction is of the demo model"),
    "an extraction with a bank": (["--extraction", "--pad-bank", "9MiB"], "--extraction is of the demo model"),
    "too few prompts": (["--extraction", "--prompts", "7"], "whole number from 8"),
    "a log that cannot be": (["--soak", "--log", "/nowhere/log"], "/nowhere/log"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    with pytest.raises(SystemExit) as left:
        flags.parse(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_every_row_is_measured_by_default() -> None:
    options = flags.parse([])
    assert options.rows == [*flags.ROWS, *flags.LIBRARY_ROWS]
    assert (options.context, options.tokens, options.batch, options.repeat) == ((32,), 64, (1,), 5)
    assert (options.planes, options.prefill, options.plot) == (("grpc",), "auto", None)


def test_contexts_batches_and_planes_are_lists() -> None:
    options = flags.parse(["--context", "4096,128,128", "--batch", "8,1", "--data-plane", "both", "--plot", "a.png"])
    assert (options.context, options.batch) == ((128, 4096), (1, 8))
    assert options.planes == ("grpc", "stream")


def test_every_command_of_the_page_on_benchmarks_is_accepted() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "README.md").read_text("utf-8")
    lines = [line for line in page.splitlines() if line.startswith("cleave-bench ")]
    assert lines
    for line in lines:
        flags.parse(shlex.split(line)[1:])


def test_an_encryption_has_no_rows_and_its_own_defaults() -> None:
    options = flags.parse(["--fhe", "--model", "m", "--markdown", "--json"])
    assert (options.rows, options.repeat, options.model) == ([], 5, "m")


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["--schemes", "secure-infer,plain"], [("plain", "float32"), ("plain", "int8"), ("secure-infer", "int8")]),
        (["--schemes", "kv-shield,kv-shield"], [("kv-shield", "float32")]),
        (
            ["--precision", "float32"],
            [(scheme, "float32") for scheme in ("plain", "kv-shield", "split", "tee-only", "transformers")],
        ),
        (["--precision", "bfloat16"], [("transformers", "bfloat16")]),
        (["--schemes", "split,tee-only", "--precision", "int8"], [("split", "int8"), ("tee-only", "int8")]),
    ],
)
def test_rows_are_chosen_by_scheme_and_precision(arguments: list[str], rows: list[tuple[str, str]]) -> None:
    assert flags.parse(arguments).rows == rows


def test_a_soak_has_its_own_defaults() -> None:
    options = flags.parse(["--soak", "--memory-budget", "2MiB"])
    assert (options.minutes, options.clients, options.seed, options.schemes) == (30.0, 8, 0, ("secure-infer",))
    assert options.memory_budget == 2 << 20
    assert options.rows == []


def test_a_curve_has_its_own_defaults() -> None:
    options = flags.parse(["--budget-curve"])
    assert options.rows == [("tee-only", "int8"), ("secure-infer", "int8")]
    assert (options.context, options.tokens, options.batch, options.repeat) == (32, 32, 1, 3)
    assert (options.budgets, options.long_context, options.plot) == (None, None, None)


def test_an_extraction_has_its_own_defaults() -> None:
    options = flags.parse(["--extraction", "--json"])
    assert (options.prompts, options.json, options.rows) == (64, True, [])
    assert flags.parse(["--extraction", "--prompts", "500"]).prompts == 500


def test_budgets_are_sizes_and_profiles_from_the_smallest() -> None:
    options = flags.parse(["--budget-curve", "--budgets", "1GiB,qsee,14MiB,optee", "--schemes", "split"])
    assert options.budgets == [14 << 20, 24 << 20, 1 << 30]
    assert options.rows == [("split", "int8")]


@pytest.mark.parametrize("work", [[], ["--soak"]])
def test_a_profile_is_a_budget(work: list[str]) -> None:
    options = flags.parse([*work, "--tee-profile", "optee", "--switch-us", "5"])
    assert (options.tee_profile, options.memory_budget, options.switch_us) == ("optee", None, 5)
    options = flags.parse([*work, "--tee-profile", "cvm", "--memory-budget", "2GiB"])
    assert (options.tee_profile, options.memory_budget) == ("cvm", 2 << 30)
    assert flags.parse(work).tee_profile == ""
