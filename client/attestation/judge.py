"""What a peer offered, judged by the rules of a policy file: live, and again from a saved bundle."""

from datetime import datetime

from client.attestation.checklist import Step
from client.attestation.claims import match
from client.attestation.examine import examine
from client.attestation.policy import Offer
from client.attestation.rules import TDX, Rules
from client.attestation.snp_case import SnpEvidence
from client.attestation.tdx import TdxEvidence
from wire import binding


def judge(provider: str, offer: Offer, rules: Rules, at: datetime) -> tuple[Step, ...]:
    """Every step taken: those of the evidence, which must be bound to nonce, key and claims, then those of the claims.

    Claims mean nothing before the evidence. Raises Refusal, with every step before it.
    """
    expected = binding.report_data(provider, offer.nonce, offer.hpke_key, offer.claims)
    evidence = (
        TdxEvidence(offer.evidence, b"".join(offer.collateral[:1]))
        if provider == TDX
        else SnpEvidence(offer.evidence, offer.certificates, offer.collateral)
    )
    return match(rules.claims, offer.claims, provider, examine(provider, evidence, rules, at, expected))
