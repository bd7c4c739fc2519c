"""From evidence of any provider to the steps of its verifier, as the policy's rules say."""

from datetime import datetime

from client.attestation import snp, tdx
from client.attestation.checklist import Refusal, Step, Wrong, refuse
from client.attestation.rules import SEV_SNP, SIMULATED, TDX, AllowList, Rules, SimulatedRules, SnpRules
from client.attestation.snp_case import SnpEvidence
from client.attestation.snp_products import PRODUCTS, TCB_LAYOUTS
from client.attestation.tdx import TdxEvidence

MARKER = b"SIMULATED-NO-TEE"  # FAMILY_ID of every simulated report: a log or a hex dump shows what it is
_FAMILY_ID = slice(0x10, 0x20)
_RESTARTED = "use the policy file that this start of the worker wrote: each has a root of its own"


def examine(
    provider: str, evidence: SnpEvidence | TdxEvidence, rules: Rules, at: datetime, expected: bytes | None
) -> tuple[Step, ...]:
    """Verify evidence that says to be of `provider`. Raises Refusal; step 0 is the choice of the provider."""
    if provider not in rules.accept:
        accepted = ", ".join(sorted(rules.accept)) or "nothing"
        wrong = Wrong(f"the policy accepts {accepted}", "use the policy that was made for this worker")
        raise refuse(provider[:32], 0, "provider", wrong)
    if isinstance(evidence, TdxEvidence):
        if provider == TDX and rules.tdx is not None:
            return tdx.verify(evidence, rules.tdx, at, expected)
    elif provider == SIMULATED and rules.simulated is not None:
        return _simulated(evidence, rules.simulated, at, expected)
    elif provider == SEV_SNP and rules.sev_snp is not None:
        return snp.verify(evidence, rules.sev_snp, at, expected)
    raise refuse(provider[:32], 0, "provider", Wrong("the evidence is of another kind", "ask for fresh evidence"))


def is_marked(report: bytes) -> bool:
    """Whether a report says of itself that it is simulated."""
    return report[_FAMILY_ID] == MARKER


def _simulated(evidence: SnpEvidence, rules: SimulatedRules, at: datetime, expected: bytes | None) -> tuple[Step, ...]:
    """The verifier of real reports, over the simulator's root. Raises Refusal."""
    if not is_marked(evidence.report):
        wrong = Wrong("the report lacks the marker of simulated evidence", "use the policy for real hardware")
        raise refuse(SIMULATED, 0, "provider", wrong)
    roots = dict.fromkeys(PRODUCTS, rules.dev_root_sha256)
    try:
        return snp.verify(evidence, _rules_of(rules), at, expected, roots, SIMULATED)
    except Refusal as refusal:
        if refusal.step.field != "chain":
            raise
        raise Refusal(SIMULATED, refusal.step, _RESTARTED, refusal.steps[:-1]) from refusal


def _rules_of(rules: SimulatedRules) -> SnpRules:
    """Simulated firmware has no versions worth a minimum, and nothing in it is worth a pin but the measurement."""
    unchecked = AllowList(unchecked=True)
    return SnpRules(
        products=frozenset(PRODUCTS),
        signers=frozenset({"vcek"}),
        vlek_csp_ids=AllowList(),
        chip_ids=unchecked,
        vmpl=0,
        min_abi=(0, 0),
        min_tcb={product: {part: 0 for part in TCB_LAYOUTS[product] if part} for product in PRODUCTS},
        allow_provisional_firmware=False,
        require_crl=False,
        measurements=rules.measurements,
        host_data=unchecked,
        id_key_digests=unchecked,
        author_key_digests=unchecked,
    )
