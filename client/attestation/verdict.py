"""A verdict, for people and as JSON: one line or object for each step, and the exit status of a command."""

import json
from collections.abc import Callable
from datetime import datetime

from client.attestation.checklist import PASSED, Refusal, Step
from client.attestation.rules import SIMULATED
from client.terminal import one_line

ACCEPTED, REFUSED = 0, 1


def conclude(
    provider: str, at: datetime, judge: Callable[[], tuple[Step, ...]], as_json: bool, left_out: str = ""
) -> int:
    """Judge and print; the exit status. `left_out` names what the steps that passed could not cover."""
    refusal = None
    try:
        steps = judge()
    except Refusal as error:
        refusal, steps = error, error.steps
    print(_json(provider, at, steps, refusal) if as_json else _text(provider, steps, refusal, left_out))
    return REFUSED if refusal else ACCEPTED


def _text(provider: str, steps: tuple[Step, ...], refusal: Refusal | None, left_out: str) -> str:
    lines = [f"{step.number:>3}  {step.verdict:<11}  {step.field:<22}  {one_line(step.text)}" for step in steps]
    if provider == SIMULATED:
        lines.append(
            "SIMULATED: this evidence proves nothing about any hardware; whoever runs the worker reads prompts"
        )
    if refusal:
        return "\n".join([*lines, f"refused at step {refusal.step.number}, {refusal.step.field}: {refusal.advice}"])
    count = sum(step.verdict != PASSED for step in steps)
    return "\n".join([*lines, f"accepted; not checked: {count} of the steps{left_out}"])


def _json(provider: str, at: datetime, steps: tuple[Step, ...], refusal: Refusal | None) -> str:
    return json.dumps(
        {
            "verdict": "refused" if refusal else "accepted",
            "provider": provider,
            "at": at.isoformat(),
            "steps": [vars(step) for step in steps],
            "advice": refusal.advice if refusal else None,
        }
    )
