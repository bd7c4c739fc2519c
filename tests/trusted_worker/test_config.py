"""The command line of the trusted worker: sizes, defaults, and what is refused in one line."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker.config import KV_TYPES, SCHEMES, parse, size

CASES = settings(deadline=None, max_examples=100, derandomize=True)
MODEL = ["--model", "folder"]


@given(st.integers(0, 1 << 50), st.sampled_from([("", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30)]))
@CASES
def test_sizes_are_numbers_with_binary_units(number: int, unit: tuple[str, int]) -> None:
    assert size(f"{number}{unit[0]}") == number << unit[1]


@pytest.mark.parametrize(
    "text", ["", "MiB", "64MB", "64mib", "64 MiB", "-1", "+1", "1.5GiB", "0x10", "1e6", "64MiBs", "\n64", "64\n", "64K"]
)
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="64MiB"):
        size(text)


def test_defaults() -> None:
    settings = parse(MODEL)
    assert settings.model == Path("folder")
    assert (settings.scheme, settings.precision, settings.prefill) == ("secure-infer", "int8", "auto")
    assert (settings.memory_budget, settings.pad_bank) == (64 << 20, 64 << 20)
    assert settings.listen == "127.0.0.1:0"
    assert settings.threads == 1
    assert not settings.insecure_plaintext
    assert (settings.tee_profile, settings.process_memory) == ("", None)
    assert (settings.switch_us, settings.embed, settings.kv_dtype) == (0, "auto", "float32")
    assert settings.projections == "gpu"
    assert not settings.insecure_unchecked_tiles


def test_values_are_taken() -> None:
    asked = ["--scheme", "split", "--precision", "float32", "--memory-budget", "14MiB", "--pad-bank", "0"]
    settings = parse([*MODEL, *asked, "--max-context", "9", "--threads", "3", "--step-seconds", "1.5"])
    assert (settings.scheme, settings.precision) == ("split", "float32")
    assert (settings.memory_budget, settings.pad_bank, settings.max_context) == (14 << 20, 0, 9)
    assert (settings.threads, settings.step_seconds) == (3, 1.5)


def test_memory_flags_are_taken() -> None:
    asked = ["--process-memory", "300MiB", "--switch-us", "25", "--embed", "client", "--insecure-unchecked-tiles"]
    settings = parse([*MODEL, "--tee-profile", "qsee", *asked])
    assert (settings.tee_profile, settings.memory_budget) == ("qsee", 24 << 20)
    assert (settings.process_memory, settings.switch_us, settings.embed) == (300 << 20, 25, "client")
    assert settings.insecure_unchecked_tiles


def test_a_confidential_machine_is_as_large_as_it_is_said_to_be() -> None:
    settings = parse([*MODEL, "--tee-profile", "cvm", "--memory-budget", "3GiB"])
    assert (settings.tee_profile, settings.memory_budget) == ("cvm", 3 << 30)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KV_TYPES)
def test_every_scheme_has_every_type_of_cache(scheme: str, kind: str) -> None:
    assert parse([*MODEL, "--scheme", scheme, "--kv-dtype", kind]).kv_dtype == kind


@pytest.mark.parametrize(
    "flags",
    [
        ["--tee-profile", "sgx1", "--switch-us", "8", "--embed", "client", "--insecure-unchecked-tiles"],
        ["--tee-profile", "cvm", "--memory-budget", "2GiB", "--process-memory", "0"],
        ["--memory-budget", "14MiB", "--kv-dtype", "int8"],
        ["--projections", "auto"],
        [],
    ],
)
def test_memory_settings_are_printed_and_read_back(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse([*MODEL, *flags, "--print-config"])
    assert left.value.code == 0
    file = tmp_path / "printed.toml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == parse([*MODEL, *flags])


def test_a_variable_names_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEAVE_TRUSTED_TEE_PROFILE", "optee")
    assert parse(MODEL).memory_budget == 14 << 20


def test_the_whole_machine_multiplies_for_tee_only() -> None:
    assert parse([*MODEL, "--scheme", "tee-only"]).threads >= 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--model"),
        ([*MODEL, "--precision", "float32"], "--precision int8"),
        ([*MODEL, "--scheme", "secure-infer", "--precision", "float32"], "--precision int8"),
        ([*MODEL, "--scheme", "rot13"], "rot13"),
        ([*MODEL, "--precision", "int4"], "int4"),
        ([*MODEL, "--prefill", "never"], "never"),
        ([*MODEL, "--projections", "somewhere"], "somewhere"),
        ([*MODEL, "--scheme", "split", "--projections", "auto"], "--projections belongs to --scheme secure-infer"),
        ([*MODEL, "--scheme", "tee-only", "--projections", "trusted"], "--projections belongs to"),
        ([*MODEL, "--memory-budget", "64MB"], "64MB"),
        ([*MODEL, "--pad-bank", "lots"], "lots"),
        ([*MODEL, "--max-context", "many"], "many"),
        ([*MODEL, "--unknown"], "--unknown"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-context", "-1"],
        ["--threads", "-1"],
        ["--step-seconds", "-1"],
        ["--step-seconds", "nan"],
        ["--session-seconds", "nan"],
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*MODEL, *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("abbreviation", ["--insecure", "--insecure-plain"])
def test_an_unsafe_switch_is_written_out_in_full(abbreviation: str) -> None:
    with pytest.raises(SystemExit):
        parse([*MODEL, abbreviation])


def test_flags_go_before_the_environment_and_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('model = "there"\nscheme = "split"\nmemory-budget = "1MiB"\nmax-context = 7\nreflection = true\n')
    monkeypatch.setenv("CLEAVE_TRUSTED_MEMORY_BUDGET", "2MiB")
    monkeypatch.setenv("CLEAVE_TRUSTED_MAX_CONTEXT", "8")
    settings = parse(["--config", str(file), "--max-context", "9"])
    assert (settings.model, settings.scheme, settings.reflection) == (Path("there"), "split", True)
    assert (settings.memory_budget, settings.max_context) == (2 << 20, 9)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--scheme", "kv-shield", "--precision", "int8"], "float32"),
        (["--rotate-every", "4"], "kv-shield"),
        (["--seal-idle"], "kv-shield"),
        (["--rope", "worker"], "kv-shield"),
        (["--kv-dtype", "int4"], "--kv-dtype"),
        (["--tee-profile", "enclave"], "'optee', 'optee-rpi3', 'qsee', 'trustzone', 'sgx1', 'cvm'"),
        (["--tee-profile", "optee", "--memory-budget", "14MiB"], "14 MiB: leave --memory-budget out"),
        (["--tee-profile", "cvm"], "add --memory-budget"),
        (["--switch-us", "-1"], "--switch-us"),
        (["--switch-us", "1000001"], "more than a second"),
        (["--embed", "worker"], "--embed"),
        (["--scheme", "plain", "--embed", "client"], "--embed client"),
        (["--scheme", "kv-shield", "--embed", "client"], "--embed client"),
        (["--process-memory", "much"], "--process-memory"),
        (["--model-key-file", "key"], "tee-only"),
        (["--config", "/nowhere.toml"], "nowhere.toml"),
        (["--log-format", "xml"], "xml"),
    ],
)
def test_what_does_not_go_together_is_said(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*MODEL, *flags])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err.strip().splitlines()[-1]


def test_kv_shield_computes_in_float32_unless_told_otherwise() -> None:
    settings = parse([*MODEL, "--scheme", "kv-shield", "--kv-dtype", "int8", "--rotate-every", "64", "--seal-idle"])
    assert (settings.precision, settings.kv_dtype, settings.rotate_every) == ("float32", "int8", 64)
    assert settings.seal_idle


def test_calls_go_over_grpc_unless_the_stream_socket_is_asked_for() -> None:
    assert parse(["--model", "m", "--gpu-worker", "unix:/run/gpu"]).stream is None
    words = ["--model", "m", "--data-plane", "stream"]
    assert parse([*words, "--gpu-worker", "unix:/run/gpu"]).stream == "unix:/run/gpu.stream"
    told = parse([*words, "--gpu-worker", "127.0.0.1:5000", "--stream", "vsock:2:5000"])
    assert (told.data_plane, told.stream) == ("stream", "vsock:2:5000")
    assert parse([*words, "--scheme", "tee-only"]).stream is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data-plane", "stream", "--gpu-worker", "127.0.0.1:5000"], "--stream ADDR"),
        (["--stream", "unix:/run/gpu.stream"], "--data-plane stream"),
        (["--data-plane", "stream", "--stream", "/run/gpu"], "--stream"),
    ],
)
def test_a_stream_socket_that_makes_no_sense(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--model", "m", *words])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
