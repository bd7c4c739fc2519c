"""What a stage waits for."""

from pathlib import Path

import pytest

from evaluation.leakage import stage
from wire.errors import UnavailableError

WIPED, DROPPED = '{"kind": "cache", "us": 1, "event": "wipe"}\n', '{"kind": "cache", "us": 2, "event": "drop"}\n'


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "REST_SECONDS", 0.0)


def test_a_conversation_rests_once_its_cache_is_wiped(tmp_path: Path) -> None:
    """Whichever segment of the recording says so."""
    (tmp_path / "00000001.jsonl").write_text(WIPED + DROPPED)
    (tmp_path / "00000002.jsonl").write_text(WIPED)
    stage._await_wiped(tmp_path, 2)
    with pytest.raises(UnavailableError, match="was not wiped"):
        stage._await_wiped(tmp_path, 3)


def test_names_of_rows_are_folders_of_their_own() -> None:
    assert len({staged.name for staged in stage.STAGED}) == len(stage.STAGED)
    assert not any("/" in staged.name for staged in stage.STAGED)
