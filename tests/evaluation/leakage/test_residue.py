"""What a process still holds is found, in its memory and its files, and nothing else is."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from evaluation.attacks.knowledge import Fact
from evaluation.leakage import residue
from evaluation.leakage.prompts import Script
from tests.evaluation.attacks.ring_views import tiny_script
from wire.errors import PreconditionError

HOLD = """
import sys
ids = [int(word) for word in sys.argv[1].split(",") if word]
held = b"".join(one.to_bytes(int(sys.argv[2]), "little") for one in ids)
file = open(sys.argv[3], "r+b")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def script(model_folder: Callable[[str], Path]) -> Script:
    return tiny_script(model_folder("llama-bf16-tied-sharded"))


@contextmanager
def holding(ids: list[int], width: int, file: Path, where: str) -> Iterator[int]:
    """The number of a process that holds these ids, in so many bytes each, in memory or in a file it may write."""
    file.write_bytes(np.array(ids, f"<i{width}").tobytes() if where == "file" else b"")
    in_memory = ",".join(map(str, ids)) if where == "memory" else ""
    argv = [sys.executable, "-c", HOLD, in_memory, str(width), str(file)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate("")


def searched(pid: int, recording: Path, script: Script) -> Fact:
    recording.mkdir(exist_ok=True)
    residue.search(pid, recording, script)
    found = residue.facts(recording, script)
    if isinstance(found, str):
        pytest.skip(found)
    return found[0]


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_ids_that_a_process_holds_are_found(tmp_path: Path, script: Script, width: int, where: str) -> None:
    ids = [int(token) for token in script.prompts[27]]
    with holding(ids, width, tmp_path / "open", where) as pid:
        found = searched(pid, tmp_path / "recording", script)
    assert (found.hits, found.trials) == (1, 1)
    said = json.loads((tmp_path / "recording" / residue.FILE).read_text())
    assert said["found"] == [27]
    assert found.p is not None
    assert found.p < 1e-4  # the vocabulary is tiny


def test_a_process_that_holds_none_is_clean(tmp_path: Path, script: Script) -> None:
    with holding([], 4, tmp_path / "open", "memory") as pid:
        found = searched(pid, tmp_path / "recording", script)
    assert (found.hits, found.p) == (0, 1.0)


def test_the_recording_itself_is_no_residue(tmp_path: Path, script: Script) -> None:
    ids, recording = [int(token) for token in script.prompts[27]], tmp_path / "recording"
    recording.mkdir()
    with holding(ids, 4, recording / "00000001.bin", "file") as pid:
        assert searched(pid, recording, script).hits == 0


def test_a_process_that_cannot_be_read_is_a_reason_and_no_fact(tmp_path: Path, script: Script) -> None:
    residue.search(1 << 30, tmp_path, script)
    assert "cannot be read" in str(residue.facts(tmp_path, script))


def test_a_recording_that_was_not_searched_is_refused(tmp_path: Path, script: Script) -> None:
    with pytest.raises(PreconditionError, match="record again"):
        residue.facts(tmp_path, script)


def test_canaries_are_found_wherever_a_word_can_lie(script: Script) -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 62, 4096).tobytes()
    wanted = residue.canaries(script)
    assert residue.matches(noise, wanted) == set()
    for at in (0, 4, 8, 20, 4096):
        ids = script.prompts[30].astype("<i4").tobytes()
        assert residue.matches(noise[:at] + ids + noise[at:], wanted) == {30}
    assert residue.matches(b"", wanted) == set()
    assert residue.matches(ids[:24], wanted) == set()


def test_prompts_of_one_token_and_short_ones_are_no_canaries(script: Script) -> None:
    named = {number for numbers in residue.canaries(script).values() for number in numbers}
    long = {number for number, prompt in enumerate(script.prompts) if len(prompt) >= residue.WINDOW}
    assert named == long - {script.knowledge.repeated}
