"""`cleave attest`: evidence of a worker that runs, or in files, judged by a policy file. One line for each step.

    cleave attest --connect ...   asks over a fresh nonce; evidence, key and claims are judged as for a session
    cleave attest verify          a report, a quote, or a bundle that `--connect ... --save` wrote

Exit status: 0 accepted, 1 refused, 2 the command or a file makes no sense. With --json one object: `verdict` (accepted,
refused), `provider`, `at`, `steps` (`number`, `field`, `verdict`: passed, not checked, refused; `text`) and `advice`
(null when accepted). A report in a file comes from nobody in particular: without --report-data an accepted verdict says
that such a guest ran somewhere, not that it is the one that you talk to. A bundle has nonce, key and claims with it: it
shows that such a guest had that key, not that it still has.
"""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from client.attestation import azure, bundle, measure, model_digest
from client.attestation.checklist import Step
from client.attestation.examine import examine, is_marked
from client.attestation.fetch import fetch
from client.attestation.judge import judge
from client.attestation.policy import Policy, verify
from client.attestation.policy_file import load
from client.attestation.rules import SEV_SNP, SIMULATED, TDX, Rules
from client.attestation.snp_case import SnpEvidence
from client.attestation.tdx import TEE_TDX, TdxEvidence, is_dice
from client.attestation.verdict import conclude
from client.terminal import one_line
from wire.binding import NONCE_BYTES
from wire.errors import CheckpointError, InvalidArgumentError

MAX_FILE_BYTES = 4 << 20
USAGE = 2
EVIDENCE_SECONDS = 30.0  # longest wait for it: hardware may take a second, and a worker takes one request at a time
_NO_CLAIMS = ", and claims, which a file has none of"


def run(options: argparse.Namespace) -> int:
    """Run one action; the exit status. Raises UnavailableError when nobody answers, and what `verify` raises."""
    actions = {"measure": measure.run, "model": model_digest.run, "verify": _verify, None: _ask}
    try:
        return actions[options.action](options)
    except (InvalidArgumentError, CheckpointError) as error:
        print(f"cleave attest{f' {options.action}' if options.action else ''}: {one_line(str(error))}", file=sys.stderr)
        return USAGE


def _ask(options: argparse.Namespace) -> int:
    policy = Policy(rules=load(options.policy))
    provider, offer = fetch(options.connect, os.urandom(NONCE_BYTES), EVIDENCE_SECONDS)
    at = datetime.now(UTC)
    if options.save:
        bundle.write(options.save, provider, offer, at)  # whatever the verdict will be
    return conclude(provider, at, lambda: verify(options.connect, provider, policy, offer, at).steps, options.json)


def _verify(options: argparse.Namespace) -> int:
    rules, at = load(options.policy), options.at or datetime.now(UTC)
    data = _read(options.evidence)
    if saved := bundle.read(data):
        if options.certs or options.collateral or options.report_data:
            raise InvalidArgumentError("a bundle has all with it: leave --certs, --collateral and --report-data out")
        return conclude(saved[0], at, lambda: judge(*saved, rules, at), options.json)
    data = _bare(data)
    certificates = tuple(map(_read, options.certs))
    collateral = tuple(map(_read, options.collateral))
    provider = _provider(data)

    def judged() -> tuple[Step, ...]:
        return _judge_file(provider, data, certificates, collateral, rules, at, options.report_data)

    return conclude(provider, at, judged, options.json, _NO_CLAIMS)


def _judge_file(
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
