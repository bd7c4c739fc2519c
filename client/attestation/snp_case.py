"""One SEV-SNP report under examination, and what its steps share."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from cryptography import x509

from client.attestation import snp_certificates, snp_products, snp_report
from client.attestation.checklist import NotChecked, Wrong
from client.attestation.rules import AllowList, SnpRules
from client.attestation.snp_certificates import Chain
from client.attestation.snp_report import Report

DAMAGED = "the evidence is damaged or was not made by AMD's firmware: ask the operator for fresh evidence"
CHANGE = "connect to another machine, or change the policy if you meant to allow this"


@dataclass(frozen=True)
class SnpEvidence:
    """What came from the other side. Nothing in it is trusted."""

    report: bytes
    certificates: tuple[bytes, ...] = ()  # PEM or DER files, in any order
    revocation_lists: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Case:
    """One report under examination. What is derived is computed when a step first needs it, and may raise Wrong."""

    evidence: SnpEvidence
    rules: SnpRules
    at: datetime
    roots: Mapping[str, str]
    expected: bytes | None

    @cached_property
    def report(self) -> Report:
        """The fields; step 1 has seen the size."""
        return snp_report.read(self.evidence.report)

    @cached_property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """What came along, read. Raises Wrong."""
        return snp_certificates.read_certificates(self.evidence.certificates)

    @cached_property
    def product(self) -> str:
        """The product line. Raises Wrong."""
        return _product(self)

    @cached_property
    def chain(self) -> Chain:
        """The verified chain to the pinned root. Raises Wrong."""
        return snp_certificates.build_chain(self.certificates, self.roots.get(self.product, ""))

    def tcb(self, raw: bytes) -> dict[str, int]:
        """The parts of a TCB. Raises Wrong when a reserved byte is set."""
        parts = snp_products.tcb_parts(self.product, raw)
        if parts is None:
            raise Wrong(f"a TCB has reserved bytes that are set: {raw.hex()}", DAMAGED)
        return parts


def listed(allowed: AllowList, value: str, what: str, shown: str = "") -> str:
    """What was seen, when the list permits it or leaves it unchecked. Raises Wrong."""
    if allowed.unchecked:
        return NotChecked(f"{what}: unchecked by the policy")
    if not allowed.permits(value):
        raise Wrong(f"{what} is not in the policy's list: {shown or value}", CHANGE)
    return f"{what} {shown or value}"


def show_parts(parts: Mapping[str, int]) -> str:
    """A TCB for people."""
    return " ".join(f"{part} {number}" for part, number in parts.items())


def _product(case: Case) -> str:
    report = case.report
    family, model, stepping = report.cpuid[:3]
    if report.version >= snp_report.CPUID_SINCE:
        found, what = snp_products.by_cpuid(family, model), f"family {family:#x}, model {model:#x}, stepping {stepping}"
    else:
        what = snp_certificates.find_leaf(case.certificates).product_name()
        found = snp_products.by_name(what)
    if found is None:
        raise Wrong(f"the product line of {what} is not known", "use a newer client, if this CPU is newer than it")
    return found
