"""A tiny model with biases, and the script said to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.attacks.public_model import PublicModel
from evaluation.leakage.prompts import Script
from tests.evaluation.attacks import scenes


@pytest.fixture(scope="session")
def public(model_folder: Callable[[str], Path]) -> PublicModel:
    return PublicModel(model_folder("qwen2"))


@pytest.fixture(scope="session")
def script(public: PublicModel) -> Script:
    return scenes.said(public)
