"""A tiny model with biases, the script said to it, and what its GPU worker recorded under kv-shield."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.attacks.public_model import PublicModel
from evaluation.leakage.prompts import Script
from tests.evaluation.attacks import recorded, scenes
from tests.evaluation.attacks.recorded import Shielded
from trusted_worker.schemes.kv_shield import Options

SHIELDS = {"static": Options(), "renewed": Options(rotate_every=3), "at rest": Options(seal_idle=True)}


@pytest.fixture(scope="session")
def public(model_folder: Callable[[str], Path]) -> PublicModel:
    return PublicModel(model_folder("qwen2"))


@pytest.fixture(scope="session")
def script(public: PublicModel) -> Script:
    return scenes.said(public)


@pytest.fixture(scope="session")
def shields(
    model_folder: Callable[[str], Path], script: Script, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Shielded]:
    """By the options in SHIELDS."""
    root = tmp_path_factory.mktemp("shielded")
    return {
        name: recorded.shielded(model_folder("qwen2"), root / name, script, options)
        for name, options in SHIELDS.items()
    }


@pytest.fixture(params=SHIELDS)
def shielded(request: pytest.FixtureRequest, shields: dict[str, Shielded]) -> Shielded:
    """One after the other."""
    return shields[request.param]
