"""Under every scheme the worker claims the digest of the bytes that it uses, sealed or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import build
from tests.simulators.in_process import InProcessWorker
from trusted_worker import assembly
from trusted_worker.config import SCHEMES, parse
from trusted_worker.pads import PadSource
from trusted_worker.process_limit import ProcessLimit
from trusted_worker.sealed_model import seal, write_key
from trusted_worker.service import Service
from wire import checkpoint
from wire.errors import CheckpointError, CleaveError, PreconditionError
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as gpu

Folder = Callable[[str], Path]


class _Here(InProcessWorker):
    """With what loading asks of an offload.GpuWorker."""

    def connect(self, patient: bool = False) -> None:
        """There is nobody to wait for."""


def service(folder: Path, scheme: str, *flags: str) -> Any:
    """One whose engine is not started."""
    words = ["--model", str(folder), "--scheme", scheme, "--gpu-worker", "unix:/nowhere", *flags]
    return Service(parse(words), ProcessLimit())


def claimed(one: Any) -> dict[str, Any]:
    """The claims after loading."""
    with pytest.raises(PreconditionError, match="model is loading"):
        one.claims()
    one._load()
    return dict(json.loads(one.claims()))


def digest(folder: Path) -> str:
    return MeasuredCheckpoint(folder, ModelConfig.from_hf(folder)).model_digest.hex()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_claims_the_model_that_it_serves(scheme: str, model_folder: Folder) -> None:
    folder = model_folder("llama")
    one = service(folder, scheme)
    one.worker = _Here(folder, one.config, one._precision)
    found = claimed(one)
    assert found["model_digest"] == digest(folder)
    assert found["schemes"] == [scheme]


@pytest.mark.parametrize("scheme", ["tee-only", "kv-shield"])
def test_a_sealed_model_has_the_digest_of_the_plain_one(scheme: str, model_folder: Folder, tmp_path: Path) -> None:
    folder, key = model_folder("llama-bf16-tied-sharded"), tmp_path / "key"
    write_key(key)
    seal(folder, tmp_path / "sealed", bytes.fromhex(key.read_text()))
    one = service(tmp_path / "sealed", scheme, "--model-key-file", str(key))
    one.worker = _Here(folder, one.config, gpu.PRECISION_FLOAT32)
    assert claimed(one)["model_digest"] == digest(folder)


@pytest.mark.parametrize("scheme", ["tee-only", "secure-infer", "split"])
def test_a_checkpoint_swapped_after_it_was_measured_is_not_loaded(
    scheme: str, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tensor's last byte, between the measurement and its first use."""
    folder = tmp_path / "llama"
    shutil.copytree(model_folder("llama"), folder)
    read_header = checkpoint._read_header

    def swap(*arguments: Any) -> Any:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x3e")
        return read_header(*arguments)

    monkeypatch.setattr(checkpoint, "_read_header", swap)
    one = service(folder, scheme)
    with pytest.raises(CheckpointError, match="changed on disk after it was measured"):
        one._load()
    with pytest.raises(CleaveError):
        one.claims()


def test_pads_are_bound_to_the_digest(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bytes]()

    class Noted(PadSource):
        def __init__(self, key: bytes, model: bytes) -> None:
            seen.append(model)
            super().__init__(key, model)

    monkeypatch.setattr(assembly, "PadSource", Noted)
    build(model_folder("llama"), "secure-infer", bank_rows=1)
    assert [one.hex() for one in seen] == [digest(model_folder("llama"))]
