"""An adapter goes up once, sealed, and again only where it is not any more."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from client.adapter import CONFIG, WEIGHTS
from client.attestation.policy import Policy
from client.session import Request, connect
from tests.client.fake_worker import ADAPTER, FakeWorker, Script
from wire.errors import CheckpointError, DeniedError, PreconditionError
from wire.sealing import SIZES, Receiver

Serve = Callable[[Script], FakeWorker]
SECRET = b"a row of somebody's adapter "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    (tmp_path / WEIGHTS).write_bytes(SECRET * 100_000)
    return tmp_path


def request(folder: Path) -> Request:
    return Request("tiny", "secure-infer", "int8", adapter_folder=folder)


def test_an_adapter_arrives_whole_and_is_opened_by_its_name(serve: Serve, folder: Path) -> None:
    worker = serve(Script())
    with connect(worker.target, Policy()) as trusted:
        for _ in range(3):
            trusted.open(request(folder)).close()
    assert (worker.config, worker.weights) == ((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())
    assert [asked.adapter for asked in worker.opened] == [ADAPTER] * 3
    assert worker.uploads == 1
    frames = [frame.SerializeToString() for frame in worker.sealed]
    assert {len(frame) for frame in frames} <= set(SIZES)
    assert all(SECRET[:8] not in frame for frame in frames)


def test_one_that_is_gone_goes_up_again(serve: Serve, folder: Path) -> None:
    worker = serve(Script())
    with connect(worker.target, Policy()) as trusted:
        trusted.open(request(folder)).close()
        worker.script.refuse_once = (grpc.StatusCode.FAILED_PRECONDITION, "no such adapter: upload it again")
        trusted.open(request(folder)).close()
        assert worker.uploads == 2
        worker.script.refuse_open = (grpc.StatusCode.FAILED_PRECONDITION, "this worker serves the model tiny")
        with pytest.raises(PreconditionError, match="serves the model"):
            trusted.open(request(folder))
        assert worker.uploads == 3


def test_a_worker_with_another_key_is_verified_before_it_gets_an_adapter(serve: Serve, folder: Path) -> None:
    worker = serve(Script())
    with connect(worker.target, Policy()) as trusted:
        worker.receiver = Receiver()
        trusted.upload(folder)
    assert (len(worker.nonces), worker.uploads) == (2, 1)


def test_another_adapter_than_was_asked_for_is_refused(serve: Serve) -> None:
    worker = serve(Script(adapter=b"of somebody else"))
    with connect(worker.target, Policy()) as trusted, pytest.raises(DeniedError, match="adapter"):
        trusted.open(Request("tiny", "secure-infer", "int8", adapter=b"mine"))


def test_less_perturbation_than_was_asked_for_is_refused(serve: Serve) -> None:
    worker = serve(Script(perturbation=0.25))
    with connect(worker.target, Policy()) as trusted:
        trusted.open(Request("tiny", "secure-infer", "int8", perturbation=0.2)).close()
        with pytest.raises(DeniedError, match="perturbs"):
            trusted.open(Request("tiny", "secure-infer", "int8", perturbation=0.3))


def test_a_folder_that_is_none_is_refused_before_anything_is_sent(serve: Serve, tmp_path: Path) -> None:
    worker = serve(Script())
    with connect(worker.target, Policy()) as trusted, pytest.raises(CheckpointError, match=CONFIG):
        trusted.open(request(tmp_path / "none"))
    assert not worker.sealed
