"""The development PKI, once a session; the genuine evidence, where there is some."""

import os
from pathlib import Path

import pytest

from tests.client.attestation.dev_pki import Pki

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()


@pytest.fixture(scope="session")
def genuine() -> Path:
    """The folder of genuine evidence, which is no part of the project."""
    folder = Path(os.environ.get("CLEAVE_EVIDENCE") or ROOT.parent / "shared" / "evidence")
    if not (folder / "snp").is_dir():
        pytest.skip(f"no genuine evidence in {folder}: set CLEAVE_EVIDENCE")
    return folder
