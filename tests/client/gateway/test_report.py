"""The report in every state of the link: the page reads the same fields of each."""

import asyncio
from pathlib import Path
from typing import Any

from client.attestation.checklist import Step, refuse
from client.attestation.checklist import Wrong as WrongStep
from client.gateway.link import Failure, Link
from client.gateway.report import report
from deploy.local import simulated_policy

ALWAYS = {
    "ready",
    "target",
    "policy_sha256",
    "verdict",
    "provider",
    "verified",
    "steps",
    "advice",
    "evidence",
    "bundle",
}


def told(folder: Path, failure: Failure | None) -> dict[str, Any]:
    """Before the first verdict, or after a failure."""
    policy = folder / "policy.toml"
    policy.write_text(simulated_policy.text("ab" * 32, "ab" * 48, "secure-infer", []))

    async def run() -> dict[str, Any]:
        link = Link("127.0.0.1:1", policy, lambda line: None)
        link.failure = failure
        return report(link)

    return asyncio.run(run())


def test_before_the_first_verdict_there_are_no_steps_and_no_evidence(tmp_path: Path) -> None:
    pending = told(tmp_path, None)
    assert set(pending) == ALWAYS
    assert (pending["verdict"], pending["verified"], pending["steps"], pending["bundle"]) == (
        "pending",
        False,
        [],
        None,
    )


def test_a_failure_is_named_with_its_steps(tmp_path: Path) -> None:
    refusal = refuse("simulated", 7, "measurement", WrongStep("another one", "ask"), [Step(1, "size", "passed", "7")])
    refused = told(tmp_path, Failure.of(refusal))
    assert set(refused) == ALWAYS | {"failed_step", "message"}
    assert (refused["verdict"], refused["failed_step"]) == ("refused", {"number": 7, "field": "measurement"})
    assert refused["steps"][0]["field"] == "size"
    assert told(tmp_path, Failure("connect", "nobody"))["verdict"] == "none"
