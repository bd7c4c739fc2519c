"""What a worker writes down with --record is what crossed and what it held; what goes wrong there does not stop it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.transcript import Cache, Exchange, Held, Transcript
from gpu_worker import config, recording
from gpu_worker.calls import CallReader
from gpu_worker.compute import carry_out
from gpu_worker.recording import Recording
from gpu_worker.worker import Worker
from tests.gpu_worker.calling import HIDDEN, MODEL, VOCABULARY, frames
from tests.gpu_worker.peer import embed, project
from wire.codec import Array
from wire.errors import PreconditionError
from wire.metrics import Histogram
from wire.v1 import gpu_worker_pb2 as pb

RESERVE = pb.Operation(cache=pb.Cache(sequence=7, reserve=pb.Reserve(tokens=20, type=pb.KV_TYPE_FLOAT32)))
FORWARD = pb.Operation(forward=pb.Forward(sequences=[pb.SequenceRows(sequence=7, rows=3)], logit_rows=[2]))
WIPE = pb.Operation(cache=pb.Cache(sequence=7, wipe=pb.Wipe()))
DROP = pb.Operation(cache=pb.Cache(sequence=7, drop=pb.Drop()))
IDS = np.array([5, 1, 9], np.int32)

Play = Callable[..., list[Any]]


@pytest.fixture
def play(model_folders: dict[str, Path], tmp_path: Path) -> Play:
    """Calls on one stream of a worker that records; the answers."""

    def run(
        precision: pb.Precision.ValueType, *calls: tuple[pb.Operation, Array | None], keep: int | None = None
    ) -> Any:
        worker = Worker(model_folders, "cpu", ring_only=False, recording=Recording(tmp_path / "kept", keep))
        worker.load(MODEL, precision)
        stream, reader, answers = worker.open_stream(), CallReader(ring_only=False), []
        for number, (operation, array) in enumerate(calls):
            found = [reader.add(frame, worker.model) for frame in frames(number, operation, array)]
            assert found[-1] is not None
            answers.append(carry_out(worker, found[-1], stream, Histogram()))
        stream.close()
        return answers

    return run


def test_calls_are_written_with_both_tensors(play: Play, tmp_path: Path) -> None:
    z = np.arange(2 * HIDDEN, dtype=np.int32).reshape(2, HIDDEN)
    operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=1, linear=pb.LINEAR_QKV))
    (answer,) = play(pb.PRECISION_INT8, (operation, z))
    (exchange,) = Transcript.read(tmp_path / "kept").exchanges
    assert exchange.operation == operation
    np.testing.assert_array_equal(exchange.up, z)
    np.testing.assert_array_equal(exchange.down, answer.result)
    assert exchange.down.dtype == np.int32


def test_passes_and_caches_are_written_too(play: Play, tmp_path: Path) -> None:
    answers = play(pb.PRECISION_FLOAT32, (RESERVE, None), (FORWARD, IDS), (WIPE, None), (DROP, None))
    found = Transcript.read(tmp_path / "kept")
    np.testing.assert_array_equal(found.exchanges[1].up, IDS)
    np.testing.assert_array_equal(found.exchanges[1].down, answers[1].result)
    held = {(one.name, one.layer): one.tensor for one in found.of(Held)}
    layers = {layer for _, layer in held}
    assert set(held) == {(name, layer) for name in ("residual", "qk", "v", "attention") for layer in layers}
    assert held["residual", 0].shape == (3, HIDDEN)
    wiped, dropped = found.of(Cache)
    assert (wiped.event, dropped.event) == ("wipe", "drop")
    assert wiped.values.shape[2] == dropped.values.shape[2] == 3
    assert not wiped.keys.any()
    assert not wiped.values.any()


def test_the_cache_is_what_was_held_when_it_goes(play: Play, tmp_path: Path) -> None:
    """Dropped by name or with its stream: v of the pass, token by token."""
    play(pb.PRECISION_FLOAT32, (RESERVE, None), (FORWARD, IDS))
    found = Transcript.read(tmp_path / "kept")
    held = {one.layer: one.tensor for one in found.of(Held) if one.name == "v"}
    (cache,) = found.of(Cache)
    for layer, v in held.items():
        np.testing.assert_array_equal(np.moveaxis(cache.values[layer], 1, 0), v)


def test_a_chain_is_written_as_a_forward_is(play: Play, tmp_path: Path) -> None:
    chain = pb.Operation(chain=pb.Chain(steps=[embed({7: [0, 1, 2]}), project(0)]))
    play(pb.PRECISION_FLOAT32, (RESERVE, None), (chain, IDS))
    (plain, chained) = (one for one in Transcript.read(tmp_path / "kept").of(Held) if one.name in ("residual", "v"))
    assert (plain.name, chained.name) == ("residual", "v")


def test_refused_calls_are_no_exchanges(play: Play, tmp_path: Path) -> None:
    answers = play(pb.PRECISION_FLOAT32, (DROP, None), (RESERVE, None), (FORWARD, IDS + VOCABULARY))
    assert [answer.refused is not None for answer in answers] == [True, False, True]
    found = Transcript.read(tmp_path / "kept")
    assert [one.operation for one in found.exchanges] == [RESERVE]
    assert [one.refused for one in found.of(Exchange)] == [True, False, True]
    assert found.of(Exchange)[2].up.size == len(IDS + VOCABULARY)  # what came with it was received


def test_a_second_process_goes_on_behind_the_first(play: Play, tmp_path: Path) -> None:
    play(pb.PRECISION_FLOAT32, (RESERVE, None))
    play(pb.PRECISION_FLOAT32, (RESERVE, None), (DROP, None))
    assert len(Transcript.read(tmp_path / "kept").of(Exchange)) == 3
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.jsonl")) == ["00000001.jsonl", "00000002.jsonl"]


def test_the_oldest_segments_go(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SEGMENT_BYTES", 1)
    play(pb.PRECISION_FLOAT32, (RESERVE, None), *[(FORWARD, IDS)] * 3, keep=2)
    left = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(left) == 4
    assert Transcript.read(tmp_path / "kept").events


def test_only_its_user_may_look(play: Play, tmp_path: Path) -> None:
    play(pb.PRECISION_FLOAT32, (RESERVE, None))
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_a_full_disk_ends_the_recording_and_not_the_work(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Recording, value: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(Recording, "_placed", full)
    answers = play(pb.PRECISION_FLOAT32, (RESERVE, None), (FORWARD, IDS))
    assert all(answer.refused is None for answer in answers)
    assert [record.message for record in caplog.records if "recording" in record.message] == [
        "the recording ends: OSError"
    ]


def test_a_folder_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreconditionError, match="must be a folder to write in"):
        Recording(tmp_path / "file")


def test_a_kept_number_of_segments_needs_a_recording(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        config.parse(["--model", str(tmp_path), "--record-keep", "3"])
    assert "--record-keep needs --record" in capsys.readouterr().err


def test_a_bad_recording_is_named(play: Play, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="holds no recording"):
        Transcript.read(tmp_path)
    play(pb.PRECISION_FLOAT32, (RESERVE, None), (FORWARD, IDS))
    (data,) = (tmp_path / "kept").glob("*.bin")
    os.truncate(data, 100)
    with pytest.raises(PreconditionError, match="is damaged"):
        Transcript.read(tmp_path / "kept")
