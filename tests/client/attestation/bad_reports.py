"""How to make SEV-SNP evidence of which one thing is wrong: everything else is good, and signed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from client.attestation.snp_case import SnpEvidence
from tests.client.attestation.dev_pki import (
    AT,
    EXPECTED,
    VLEK,
    LeafForm,
    Pki,
    der,
    evidence,
    issuer_of,
    leaf_form,
    report,
    sign,
    tcb_bytes,
    tcb_of,
)

PAST, FUTURE = datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
Make = Callable[[Pki], SnpEvidence]


@dataclass(frozen=True)
class Bad:
    """One refusal: the step that must refuse, and how to make the evidence; or rules, or the expected report data."""

    step: str
    why: str
    make: Make = evidence
    rules: dict[str, Any] = field(default_factory=dict)
    expected: bytes = EXPECTED
    at: datetime = AT


def said(step: str, why: str, product: str = "Milan", version: int = 3, **fields: Any) -> Bad:
    """A report that says one other thing, properly signed."""
    return Bad(step, why, lambda pki: evidence(pki, product, version, **fields))


def raw(step: str, why: str, change: Callable[[bytes], bytes]) -> Bad:
    """Bytes changed after signing."""
    return Bad(step, why, lambda pki: replace(evidence(pki), report=change(evidence(pki).report)))


def chained(step: str, why: str, certificates: Callable[[Pki], list[bytes]], **rest: Any) -> Bad:
    """A good report with other certificates."""
    return Bad(step, why, lambda pki: replace(evidence(pki), certificates=tuple(certificates(pki))), **rest)


def leafed(
    step: str,
    why: str,
    change: Callable[[LeafForm], LeafForm],
    product: str = "Milan",
    signer: str = "vcek",
    version: int = 3,
) -> Bad:
    """A report signed by the key of another leaf."""

    def make(pki: Pki) -> SnpEvidence:
        key, leaf = pki.leaf(change(leaf_form(product, signer)), issuer_of(signer))
        above = pki.asvk if signer == "vlek" else pki.ask
        return SnpEvidence(
            report(key, product, version, signer), (der(leaf), der(above), der(pki.ark)), (pki.revocation_list(),)
        )

    return Bad(step, why, make, VLEK if signer == "vlek" else {})


def listed(why: str, lists: Callable[[Pki], list[bytes]]) -> Bad:
    """A good report with other revocation lists."""
    return Bad("revocation", why, lambda pki: replace(evidence(pki), revocation_lists=tuple(lists(pki))))


def good(pki: Pki) -> list[bytes]:
    return list(evidence(pki).certificates)


def low(name: str, part: str, product: str = "Milan") -> Bad:
    """One TCB of the four with one part below the minimum. Reported: its certificate says the same."""
    parts = {**tcb_of(product), part: 0}
    step = "minimum TCB"
    if name != "reported":
        return said(step, f"{product} {name} {part}", product, **{f"{name}_tcb": tcb_bytes(product, parts)})  # type: ignore[arg-type]
    numbers = {"bl": "3.1", "tee": "3.2", "snp": "3.3", "ucode": "3.8", "fmc": "3.9"}

    def make(pki: Pki) -> SnpEvidence:
        form = leaf_form(product, "vcek").having(numbers[part], b"\x02\x01\x00")
        key, leaf = pki.leaf(form, "SEV-Dev")
        text = report(key, product, reported_tcb=tcb_bytes(product, parts))
        return SnpEvidence(text, (der(leaf), der(pki.ask), der(pki.ark)), (pki.revocation_list(),))

    return Bad(step, f"{product} reported {part}", make)


def other(number: str, value: bytes) -> Callable[[LeafForm], LeafForm]:
    return lambda form: form.having(number, value)


def lacking(number: str) -> Callable[[LeafForm], LeafForm]:
    return lambda form: form.without(number)


def impostor_ark(pki: Pki) -> bytes:
    return der(pki.authority("ARK-Dev", "ARK-Dev", pki.impostor, pki.impostor))


def resigned(change: Callable[[bytes], bytes]) -> Make:
    """Behind the signed range, with a good signature."""

    def make(pki: Pki) -> SnpEvidence:
        key, _ = pki.good_leaf("Milan", "vcek")
        return replace(evidence(pki), report=sign(change(evidence(pki).report), key))

    return make


def flipped(offset: int) -> Callable[[bytes], bytes]:
    return lambda text: text[:offset] + bytes([text[offset] ^ 1]) + text[offset + 1 :]


def resized(size: int) -> Callable[[bytes], bytes]:
    return lambda text: (text * 2)[:size]
