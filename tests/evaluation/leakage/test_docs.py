"""docs/leakage.md is what the report makes of docs/leakage.json, and the README quotes nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.leakage import table
from evaluation.leakage.report import document, ordered, summary

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "leakage.json").read_text("ascii"))
    return found


def test_the_page_is_the_report(result: dict[str, Any]) -> None:
    """Both are written by cleave-leakage --quick --json --markdown docs/leakage.md --plot docs/leakage.png."""
    assert (ROOT / "docs" / "leakage.md").read_text("utf-8") == document(result, Path("leakage.png")) + "\n"


def test_the_readme_has_its_figures(result: dict[str, Any]) -> None:
    assert "\n".join(summary(result)) in (ROOT / "README.md").read_text("utf-8")


def test_the_run_is_of_the_attacks_that_there_are(result: dict[str, Any]) -> None:
    assert ordered(result, "attack") == [entry.name for entry in table.ATTACKS]
    assert {one.name for one in table.RELATIVES} <= set(ordered(result, "scheme"))
    assert result["gate"]["failures"] == []
