"""Provisioned parameters: used by their stream only, once they are whole, and within an allowance; sealed folders."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu_worker.worker import Worker
from tests.gpu_worker.calling import HIDDEN, MODEL, TIED, VOCABULARY
from tests.gpu_worker.peer import F32, Peer, Rows, attend, embed, finish, flat, head, project
from wire.checkpoint import Checkpoint
from wire.errors import ExhaustedError, InvalidArgumentError, PreconditionError
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read
from wire.v1 import gpu_worker_pb2 as pb

PROMPT = [3, 141, 59, 26, 5, 200, 260, 0, 17, 17, 99]
O_1 = Name(Kind.LINEAR, 1, Linear.O)


def weights(folder: Path) -> dict[Name, F32]:
    """Every parameter of a folder."""
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    found = {name: read(checkpoint, parameter) for name, parameter in parameters(config).items()}
    checkpoint.close()
    return found


def pieces(rows: F32, size: int) -> Iterator[tuple[int, F32]]:
    for first in range(0, len(rows), size):
        yield first, np.ascontiguousarray(rows[first : first + size])


def provision_all(peer: Peer, of: dict[Name, F32], size: int = 100) -> None:
    for name, rows in of.items():
        for first, piece in pieces(rows, size):
            peer.provision(name, piece, first)


@pytest.fixture
def sealed(model_folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Folders as they are left when the weights are sealed: a configuration, and files that nobody here can read."""
    made = {}
    for name in ("qwen3", "gpt2", "chatglm3"):
        made[name] = tmp_path / name
        made[name].mkdir()
        (made[name] / "config.json").write_bytes((model_folders[name] / "config.json").read_bytes())
        (made[name] / "model.safetensors.sealed").write_bytes(b"sealed")
    return made


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "chatglm3"])
def test_a_sealed_model_that_is_provisioned_equals_the_loaded_one(
    worker: Worker, model_folders: dict[str, Path], sealed: dict[str, Path], name: str
) -> None:
    loaded, bare = Peer(worker, name), Peer(Worker(sealed, "cpu", ring_only=False), name)
    loaded.reserve(1)
    bare.reserve(1)
    with pytest.raises(PreconditionError, match="sealed"):
        bare.forward({1: PROMPT})
    with pytest.raises(PreconditionError, match="sealed"):
        bare.chain([embed({1: PROMPT}), project(0)], flat({1: PROMPT}))
    provision_all(bare, weights(model_folders[name]))
    np.testing.assert_array_equal(bare.forward({1: PROMPT}), loaded.forward({1: PROMPT}))
    x = np.ones((2, HIDDEN), np.float32)
    operation = pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_LM_HEAD))
    np.testing.assert_array_equal(bare.call(operation, x), loaded.call(operation, x))


def test_a_sealed_model_is_float32(sealed: dict[str, Path]) -> None:
    for ring_only in (False, True):
        with pytest.raises(PreconditionError, match="sealed"):
            Worker(sealed, "cpu", ring_only).load("qwen3", pb.PRECISION_INT8)


def test_an_overlay_is_of_its_stream(worker: Worker, model_folders: dict[str, Path]) -> None:
    mine, theirs = Peer(worker, MODEL), Peer(worker)
    mine.reserve(1, 2)
    theirs.reserve(1)
    before = mine.forward({1: PROMPT})
    mine.provision(O_1, 2 * weights(model_folders[MODEL])[O_1])
    assert np.abs(mine.forward({2: PROMPT}) - before).max() > 0.1
    np.testing.assert_array_equal(theirs.forward({1: PROMPT}), before)


def test_a_parameter_counts_once_it_is_whole(worker: Worker, model_folders: dict[str, Path]) -> None:
    peer, rows = Peer(worker, MODEL), weights(model_folders[MODEL])[O_1]
    peer.reserve(1, 2)
    before = peer.forward({1: PROMPT})
    peer.provision(O_1, rows[:20])
    with pytest.raises(PreconditionError, match="in part"):
        peer.forward({2: PROMPT})
    peer.provision(O_1, rows[20:], 20)
    np.testing.assert_array_equal(peer.forward({2: PROMPT}), before)
    peer.provision(O_1, rows[:20])
    with pytest.raises(PreconditionError, match="in part"):
        peer.forward({2: [1]})


@pytest.mark.parametrize(
    ("first", "rows"), [(3, 5), (21, 5), (19, 5), (20, HIDDEN - 19), (HIDDEN, 1), ((1 << 32) - 1, 1)]
)
def test_rows_out_of_order_are_refused(worker: Worker, first: int, rows: int) -> None:
    peer = Peer(worker, MODEL)
    peer.provision(O_1, np.zeros((20, HIDDEN), np.float32))
    with pytest.raises(InvalidArgumentError, match="rows"):
        peer.provision(O_1, np.zeros((rows, HIDDEN), np.float32), first)


@pytest.mark.parametrize(
    "name",
    [
        Name(Kind.POSITIONS),
        Name(Kind.Q_NORM, 0),
        Name(Kind.ATTENTION_NORM, 3),
        Name(Kind.FINAL_NORM, 1),
        Name(Kind.FFN_NORM, 0, bias=True),
        Name(Kind.LINEAR, 0),
        Name(Kind.LINEAR, 0, Linear.QKV, bias=True),
        Name(Kind.EMBEDDING, 0, Linear.QKV),
    ],
)
def test_parameters_that_the_model_does_not_have(worker: Worker, name: Name) -> None:
    with pytest.raises(InvalidArgumentError, match="no such parameter"):
        Peer(worker, MODEL).provision(name, np.zeros((HIDDEN, 1), np.float32))


def test_kinds_and_widths_that_there_are_not(worker: Worker) -> None:
    peer = Peer(worker, TIED)
    for op in (pb.Provision(), pb.Provision(kind=9), pb.Provision(kind=1, linear=17)):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="unknown parameter"):
            peer.call(pb.Operation(provision=op), np.zeros((1, 1), np.float32))
    for shape in ((HIDDEN, 2), (0, HIDDEN), (HIDDEN + 1, HIDDEN)):
        with pytest.raises(InvalidArgumentError):
            peer.provision(O_1, np.zeros(shape, np.float32))
    with pytest.raises(InvalidArgumentError, match="no such parameter"):
        peer.provision(Name(Kind.LINEAR, 0, Linear.LM_HEAD), np.zeros((VOCABULARY, HIDDEN), np.float32))  # it is tied


def test_int8_models_take_no_parameters(worker: Worker) -> None:
    with pytest.raises(PreconditionError, match="float32"):
        Peer(worker, MODEL, pb.PRECISION_INT8).provision(O_1, np.zeros((HIDDEN, HIDDEN), np.float32))


def test_a_tied_head_is_the_provisioned_embedding(worker: Worker, model_folders: dict[str, Path]) -> None:
    peer, table = Peer(worker, TIED), weights(model_folders[TIED])[Name(Kind.EMBEDDING)]
    peer.provision(Name(Kind.EMBEDDING), -table)
    x = np.random.default_rng(0).standard_normal((2, HIDDEN)).astype(np.float32)
    logits = peer.call(pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_LM_HEAD)), x)
    np.testing.assert_allclose(logits, x @ -table.T, rtol=1e-4, atol=1e-4)


def test_streams_share_the_bytes_of_one_model(worker: Worker, model_folders: dict[str, Path]) -> None:
    of = weights(model_folders[MODEL])
    first, second = Peer(worker, MODEL), Peer(worker)
    provision_all(first, of)
    provision_all(first, of)  # anew, in the same memory
    second.reserve(1)
    with pytest.raises(ExhaustedError, match="would fit"):
        second.provision(Name(Kind.FINAL_NORM), of[Name(Kind.FINAL_NORM)])
    first.stream.close()
    provision_all(second, of)
    second.stream.close()
    assert worker._overlay_allowance.used == 0


def test_another_model_has_another_overlay(worker: Worker, model_folders: dict[str, Path]) -> None:
    peer = Peer(worker, MODEL)
    peer.provision(O_1, np.zeros((HIDDEN, HIDDEN), np.float32))
    worker.load(TIED, pb.PRECISION_FLOAT32)
    peer.reserve(1, 2)
    before = peer.forward({1: PROMPT})
    peer.provision(O_1, weights(model_folders[TIED])[O_1])
    np.testing.assert_array_equal(peer.forward({2: PROMPT}), before)
    assert worker._overlay_allowance.used == 4 * HIDDEN * HIDDEN


def test_a_pass_goes_on_with_what_is_provisioned_meanwhile(worker: Worker, model_folders: dict[str, Path]) -> None:
    peer, of = Peer(worker, MODEL), weights(model_folders[MODEL])
    peer.reserve(1, 2)
    rows: Rows = {1: PROMPT}
    a = peer.chain([embed(rows), project(0), attend(0)], flat(rows))
    for name in (Name(Kind.LINEAR, 2, Linear.O), Name(Kind.LINEAR, 2, Linear.DOWN)):
        peer.provision(name, np.zeros_like(of[name]))  # layer 2 adds nothing
    a = peer.chain([finish(0), project(1), attend(1)], a)
    a = peer.chain([finish(1), project(2), attend(2)], a)
    logits = peer.chain([finish(2), head([10])], a)
    np.testing.assert_allclose(logits, peer.forward({2: PROMPT}, [10]), rtol=1e-5, atol=1e-5)
