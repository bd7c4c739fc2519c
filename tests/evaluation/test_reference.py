"""A row of the library over its real process, and what becomes of it when that process ends."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from evaluation import reference
from evaluation.measure import Load
from evaluation.reference import Reference, missing
from wire.errors import UnavailableError

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
needs_library = pytest.mark.skipif(missing() is not None, reason="transformers is not installed")


def rig(folder: Path, stages: list[str]) -> Reference:
    return Reference(folder, "float32", "cpu", False, [Load(5, 4, 2)], lambda stage, _: stages.append(stage))


@needs_library
def test_a_repetition_is_one_of_a_batch_in_lockstep_and_a_dead_process_is_named() -> None:
    stages: list[str] = []
    with rig(DEMO, stages) as running:
        sample = running.repeat(Load(5, 4, 2))
        assert sample.tokens == 2 * 4
        assert sample.first > 0
        assert len(sample.gaps) == 2
        assert sample.gaps[0] == sample.gaps[1] > 0
        assert set(sample.cpu) == set(running.resident()) == {"client", "transformers"}
        assert (sample.pad, sample.after.exchanges) == (None, 0)
        pid = running._child.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="the process of transformers stopped"):
            running.repeat(Load(5, 4, 2))
    assert not Path(f"/proc/{pid}").exists()
    assert stages[-1] == "measuring transformers float32"


@needs_library
def test_a_folder_that_it_cannot_load_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    one = rig(tmp_path, [])
    with pytest.raises(UnavailableError, match="the process of transformers stopped"):
        one.__enter__()
    assert not Path(f"/proc/{one._child.pid}").exists()


def test_without_the_library_there_is_a_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    found = reference.missing()
    assert found is not None
    assert "pip install torch transformers" in found
