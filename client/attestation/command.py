"""`cleave attest verify`: a report or a quote in a file, judged by a policy file. One line for each step.

Exit status: 0 accepted, 1 refused, 2 the command or a file makes no sense. With --json one object: `verdict` (accepted,
refused), `provider`, `at`, `steps` (`number`, `field`, `verdict`: passed, not checked, refused; `text`) and `advice`
(null when accepted). Evidence in a file comes from nobody in particular: without --report-data an accepted verdict says
that such a guest ran somewhere, not that it is the one that you talk to.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from client.attestation import azure, measure, model_digest
from client.attestation.checklist import PASSED, Refusal, Step
from client.attestation.examine import examine, is_marked
from client.attestation.policy_file import load
from client.attestation.rules import SEV_SNP, SIMULATED, TDX, Rules
from client.attestation.snp_case import SnpEvidence
from client.attestation.tdx import TEE_TDX, TdxEvidence, is_dice
from client.terminal import one_line
from wire.errors import CheckpointError, InvalidArgumentError

MAX_FILE_BYTES = 4 << 20
ACCEPTED, REFUSED, USAGE = 0, 1, 2


def run(options: argparse.Namespace) -> int:
    """Run one action; the exit status."""
    actions = {"measure": measure.run, "model": model_digest.run, "verify": _verify}
    try:
        return actions[options.action](options)
    except (InvalidArgumentError, CheckpointError) as error:
        print(f"cleave attest {options.action}: {one_line(str(error))}", file=sys.stderr)
        return USAGE


def _verify(options: argparse.Namespace) -> int:
    rules = load(options.policy)
    data = _bare(_read(options.evidence))
    certificates = tuple(map(_read, options.certs))
    collateral = tuple(map(_read, options.collateral))
    at = options.at or datetime.now(UTC)
    provider = _provider(data)
    refusal = None
    try:
        steps = _judge(provider, data, certificates, collateral, rules, at, options.report_data)
    except Refusal as error:
        refusal, steps = error, error.steps
    print(_as_json(provider, at, steps, refusal) if options.json else _as_text(provider, steps, refusal))
    return REFUSED if refusal else ACCEPTED


def _judge(
    provider: str,
    data: bytes,
    certificates: tuple[bytes, ...],
    collateral: tuple[bytes, ...],
    rules: Rules,
    at: datetime,
    expected: bytes | None,
) -> tuple[Step, ...]:
    if provider == TDX:
        return examine(provider, TdxEvidence(data, b"".join(collateral[:1])), rules, at, expected)
    if data[:4] != azure.MAGIC:
        return examine(provider, SnpEvidence(data, certificates, collateral), rules, at, expected)
    try:
        hcl = azure.split(data)
    except ValueError as error:
        raise InvalidArgumentError(f"this HCL report cannot be read: {error}") from error
    inside = SnpEvidence(hcl.report, certificates, collateral)
    raise azure.unsupported(examine(provider, inside, rules, at, azure.expected_report_data(hcl)))


def _provider(data: bytes) -> str:
    """What the bytes look like. A wrong guess accepts nothing: the verifier of that kind judges them."""
    tdx = data[2:4] != b"\0\0" and data[4:8] == TEE_TDX.to_bytes(4, "little")
    if tdx or is_dice(data):
        return TDX
    return SIMULATED if is_marked(data) else SEV_SNP


def _read(path: Path) -> bytes:
    """A file of a sane size. Raises InvalidArgumentError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read") from error
    if not 0 < len(data) <= MAX_FILE_BYTES:
        raise InvalidArgumentError(f"{path} is empty or has more than {MAX_FILE_BYTES} bytes")
    return data


def _bare(data: bytes) -> bytes:
    """The evidence itself: out of hex, and out of the JSON around an HCL report. Raises InvalidArgumentError."""
    try:
        return azure.unwrap(bytes.fromhex(data.decode("ascii")))
    except ValueError:
        pass
    try:
        return azure.unwrap(data)
    except ValueError as error:
        raise InvalidArgumentError(f"the evidence cannot be read: {error}") from error


def _as_text(provider: str, steps: Iterable[Step], refusal: Refusal | None) -> str:
    lines = [f"{step.number:>3}  {step.verdict:<11}  {step.field:<22}  {one_line(step.text)}" for step in steps]
    if provider == SIMULATED:
        lines.append(
            "SIMULATED: this evidence proves nothing about any hardware; whoever runs the worker reads prompts"
        )
    if refusal:
        return "\n".join([*lines, f"refused at step {refusal.step.number}, {refusal.step.field}: {refusal.advice}"])
    left_out = sum(step.verdict != PASSED for step in steps)
    return "\n".join([*lines, f"accepted; not checked: {left_out} of the steps, and claims, which a file has none of"])


def _as_json(provider: str, at: datetime, steps: Iterable[Step], refusal: Refusal | None) -> str:
    return json.dumps(
        {
            "verdict": "refused" if refusal else "accepted",
            "provider": provider,
            "at": at.isoformat(),
            "steps": [vars(step) for step in steps],
            "advice": refusal.advice if refusal else None,
        }
    )
