"""Settings: flags over variables over a file, one set of errors, and a way back from --print-config."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as cases
from hypothesis import strategies as st

from wire.settings import as_toml, parse

PREFIX = "CLEAVE_TEST_"
VALUES = [("flag", ["--rows=3"], 3), ("variable", [], 2), ("file", [], 1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="tested")
    parser.add_argument("--rows", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--wait-seconds", type=float, default=1.5)
    parser.add_argument("--model", action="append", required=True, type=Path)
    parser.add_argument("--name")
    parser.add_argument("--loud", action="store_true")
    return parser


def _parse(*arguments: object) -> dict[str, Any]:
    return parse(_parser(), ["--model=m", *map(str, arguments)], PREFIX)


def _file(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, "utf-8")
    return path


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        _parse(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_flags_own() -> None:
    expected = {"rows": 0, "wait_seconds": 1.5, "model": [Path("m")], "name": None, "loud": False}
    assert _parse() == expected


@pytest.mark.parametrize(("source", "flags", "expected"), VALUES)
def test_flags_go_before_variables_and_variables_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, flags: list[str], expected: int
) -> None:
    if source != "file":
        monkeypatch.setenv("CLEAVE_TEST_ROWS", "2")
    monkeypatch.setenv("CLEAVE_TEST_CONFIG", str(_file(tmp_path, "rows = 1\nloud = true")))
    resolved = _parse(*flags)
    assert (resolved["rows"], resolved["loud"]) == (expected, True)


def test_a_repeated_flag_is_a_list_of_the_first_source_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _file(tmp_path, 'model = ["a", "b c"]')
    assert parse(_parser(), ["--config", str(file)], PREFIX)["model"] == [Path("a"), Path("b c")]
    monkeypatch.setenv("CLEAVE_TEST_MODEL", "d,e")
    assert parse(_parser(), [f"--config={file}"], PREFIX)["model"] == [Path("d,e")]
    assert _parse("--config", file)["model"] == [Path("m")]
    assert _parse("--config", file, "--model", "n")["model"] == [Path("m"), Path("n")]


def test_the_command_line_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEAVE_TEST_CONFIG", "no/such/file")
    assert _parse("--config", _file(tmp_path, "rows = 4"))["rows"] == 4


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWS", "LOUD", "CONFIG"):
        monkeypatch.setenv(f"CLEAVE_TEST_{name}", "")
    assert _parse()["rows"] == 0


@pytest.mark.parametrize(("text", "loud"), [("true", True), ("1", True), ("YES", True), ("no", False), ("0", False)])
def test_truth(monkeypatch: pytest.MonkeyPatch, text: str, loud: bool) -> None:
    monkeypatch.setenv("CLEAVE_TEST_LOUD", text)
    assert _parse()["loud"] is loud


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colour = 1", "no setting colour"),
        ("wait_seconds = 1", "no setting wait_seconds"),
        ("config = 'another'", "no setting config"),
        ("print-config = true", "no setting print-config"),
        ("help = true", "no setting help"),
        ("rows = 'many'", "--rows: invalid int"),
        ("rows = true", "rows must be one"),
        ("rows = [1, 2]", "rows must be one"),
        ("name = ['x']", "name must be one"),
        ("[name]\nfirst = 'x'", "name must be one"),
        ("loud = 2", "loud must be true or false"),
        ("loud = []", "loud must be true or false"),
        ("rows = ", "not a readable TOML file"),
    ],
)
def test_files_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    assert complaint in _refused(capsys, "--config", _file(tmp_path, text)).splitlines()[-1]


def test_a_list_of_lists_is_no_list_of_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(_parser(), ["--config", str(_file(tmp_path, "model = [['a']]"))], PREFIX)
    assert "model must be one" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("COLOUR", "1"), ("ROWS", "many"), ("LOUD", "perhaps"), ("HELP", "1")])
def test_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(f"CLEAVE_TEST_{name}", value)
    assert name.lower() in _refused(capsys)


@pytest.mark.parametrize("arguments", [["--config", "no/such/file"], ["--config"], ["--row", "1"], ["--config", "."]])
def test_command_lines_that_make_no_sense(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "tested: error:" in _refused(capsys, *arguments)


def test_help_shows_defaults_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLEAVE_TEST_COLOUR", "1")
    with pytest.raises(SystemExit) as caught:
        parse(_parser(), ["--help"], PREFIX)
    assert caught.value.code == 0
    assert "default: 0" in capsys.readouterr().out


def test_a_value_that_looks_like_a_flag_stays_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEAVE_TEST_NAME", "--loud")
    resolved = _parse()
    assert (resolved["name"], resolved["loud"]) == ("--loud", False)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\x7f"), min_size=1, max_size=20)


@given(
    rows=st.integers(-(1 << 40), 1 << 40), wait=st.floats(1e-9, 1e18), name=st.none() | TEXTS, loud=st.booleans(),
    models=st.lists(TEXTS, min_size=1, max_size=3),
)  # fmt: skip
@cases(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_printed_is_read_back(
    tmp_path: Path, rows: int, wait: float, name: str | None, loud: bool, models: list[str]
) -> None:
    expected = {"rows": rows, "wait_seconds": wait, "model": [Path(one) for one in models], "name": name, "loud": loud}
    file = _file(tmp_path, as_toml({key.replace("_", "-"): value for key, value in expected.items()}))
    assert parse(_parser(), ["--config", str(file)], PREFIX) == expected


def test_print_config_says_what_the_settings_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLEAVE_TEST_WAIT_SECONDS", "2.5")
    with pytest.raises(SystemExit) as caught:
        _parse("--print-config", "--config", _file(tmp_path, "rows = 7"))
    assert caught.value.code == 0
    expected = {"rows": 7, "wait-seconds": 2.5, "model": ["m"], "loud": False}
    assert tomllib.loads(capsys.readouterr().out) == expected
