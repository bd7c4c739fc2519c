"""What is checked before anything is measured, when a picture is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import pictures
from wire.errors import PreconditionError

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_that_is_none_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "nowhere" / "a.png", tmp_path / "a.jpg"):
        with pytest.raises(PreconditionError, match=r"must be a \.png file in a folder"):
            pictures.require(path)
    pictures.require(tmp_path / "a.png")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PreconditionError, match=r"pip install 'cleave\[plots\]'"):
        pictures.require(Path("a.png"))


def test_matplotlib_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, evaluation.bench; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
