"""The development PKI and the simulated TEE, once a session; the genuine evidence, where there is some."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.attestation.dev_pki import Pki
from tests.client.attestation.simulator import Simulator

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """The process, which makes RSA keys: once is enough."""
    running = Simulator(tmp_path_factory.mktemp("simulator") / "tsm")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def genuine() -> Path:
    """The folder of genuine evidence, which is no part of the project."""
    folder = Path(os.environ.get("CLEAVE_EVIDENCE") or ROOT.parent / "shared" / "evidence")
    if not (folder / "snp").is_dir():
        pytest.skip(f"no genuine evidence in {folder}: set CLEAVE_EVIDENCE")
    return folder
