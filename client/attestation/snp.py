"""Verification of SEV-SNP reports: these steps, in this order; the first that is wrong refuses.

     1 size                   the report has exactly 1184 bytes
     2 version                2, 3, 4 or 5
     3 reserved bits          what must be zero is zero, what must be one is one, behind the signature too
     4 signature algorithm    1: ECDSA, P-384, SHA-384
     5 signing key            VCEK or VLEK, as the policy allows
     6 product line           from the CPUID (version 2: from the certificate), and allowed by the policy
     7 chain                  VCEK < ASK, or VLEK < ASVK, < the ARK that is pinned for the product line
     8 validity               every certificate of the chain, at the given time
     9 revocation             the ARK's list, where the policy requires one or one came
    10 report signature       over bytes 0 to 0x29F, by the certificate's key
    11 reported TCB           equals the TCB that the certificate's key was made for
    12 chip id                VCEK: the certificate's hardware id, and the policy's list; VLEK: the provider's name
    13 debug                  the host cannot read the guest's memory
    14 migration              no migration agent
    15 VMPL                   exactly the policy's
    16 ABI                    firmware, current and committed, at least the policy's
    17 minimum TCB            current, committed, reported, launch: every part at least the policy's
    18 provisional firmware   the running firmware is committed (microcode may be ahead: it is above the minimum anyway)
    19 measurement            in the policy's list
    20 host data              in the policy's list
    21 id keys                digests of the id key and of the author key, in the policy's lists
    22 report data            equals what is expected, in constant time

`STEPS` are the same steps; a test compares. What a policy spells "unchecked" is reported as not checked.
"""

from collections.abc import Mapping
from datetime import datetime

from client.attestation import snp_products
from client.attestation.checklist import Step, run
from client.attestation.rules import SEV_SNP, SnpRules
from client.attestation.snp_case import Case, SnpEvidence
from client.attestation.snp_genuine import GENUINE
from client.attestation.snp_state import STATE

STEPS = GENUINE + STATE


def verify(
    evidence: SnpEvidence,
    rules: SnpRules,
    at: datetime,
    expected: bytes | None,
    roots: Mapping[str, str] = snp_products.AMD_ROOTS,
    provider: str = SEV_SNP,
) -> tuple[Step, ...]:
    """Every step taken. Raises Refusal. `at` has a time zone; `expected` are the 64 bytes of report data.

    Without `expected`, step 22 is not checked: such a verdict says nothing about who sent the evidence.
    """
    return run(provider, STEPS, Case(evidence, rules, at, roots, expected))
