"""Verification of TDX quotes: these steps, in this order; the first that is wrong refuses.

     1 format                 a quote of a sane size; DICE (CWT) quotes are not supported
     2 version and TEE type   version 4 or 5, ECDSA on P-256, TEE type TDX
     3 signature              body < attestation key < quoting enclave < PCK < Intel's root, valid at the given time
     4 debug                  the host cannot read the guest's memory
     5 collateral             dcap-qvl: TCB info, enclave identity and revocation lists, in force at the given time
     6 TCB status             in the policy's list
     7 collateral age         not older than the policy's days at the given time
     8 TDATTRIBUTES           exactly the policy's
     9 MRSEAM                 the TDX module, in the policy's list
    10 MRTD                   in the policy's list
    11 RTMR                   each of the four, in its list
    12 MRCONFIGID             in the policy's list
    13 report data            equals what is expected, in constant time

Signatures and the TCB are judged by `dcap-qvl`; the policy is ours. `dcap-qvl` accepts a quote of any status: it says
which, and step 6 decides.
"""

import hmac
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from client.attestation.checklist import NotChecked, Step, Wrong, run
from client.attestation.rules import TDX, AllowList, TdxRules
from client.attestation.tdx_signature import DAMAGED, INTEL_ROOT, check_signature

MIN_QUOTE_BYTES = 48 + 584 + 4
MAX_QUOTE_BYTES = 8 << 10  # longer ones are DICE quotes: the kernel's buffer for ECDSA quotes has this size
MAX_COLLATERAL_BYTES = 1 << 20
SECONDS_A_DAY = 86_400
VERSIONS, ECDSA_P256, TEE_TDX = (4, 5), 2, 0x81
_CBOR_TAGS = range(0xC0, 0xDC)  # a CWT begins with one
_CHANGE = "connect to another machine, or change the policy if you meant to allow this"
_FRESH = (
    "get the collateral of this machine (its FMSPC) from Intel's PCS or a cache of it and pass it with --collateral"
)


@dataclass(frozen=True)
class TdxEvidence:
    """What came from the other side. Nothing in it is trusted."""

    quote: bytes
    collateral: bytes = b""  # JSON, as dcap-qvl reads it; empty: none came


@dataclass(frozen=True)
class _Case:
    """One quote under examination."""

    evidence: TdxEvidence
    rules: TdxRules
    at: datetime
    root: str
    expected: bytes | None

    @cached_property
    def body(self) -> Any:
        """The TD report, unverified until step 3 has passed. Raises Wrong."""
        try:
            return _library().Quote.parse(self.evidence.quote).report
        except ValueError as error:
            raise Wrong("the quote cannot be read", DAMAGED) from error

    @cached_property
    def collateral(self) -> Any:
        """The collateral, read. Raises Wrong."""
        if not self.evidence.collateral:
            raise Wrong("no collateral came with the quote", _FRESH)
        if len(self.evidence.collateral) > MAX_COLLATERAL_BYTES:
            raise Wrong(f"the collateral has more than {MAX_COLLATERAL_BYTES} bytes", _FRESH)
        try:
            return _library().QuoteCollateralV3.from_json(self.evidence.collateral.decode("utf-8"))
        except ValueError as error:
            raise Wrong("the collateral cannot be read", _FRESH) from error

    @cached_property
    def status(self) -> str:
        """What dcap-qvl says of the TCB, everything else being in order. Raises Wrong."""
        try:
            report = _library().verify(self.evidence.quote, self.collateral, int(self.at.timestamp()))
        except ValueError as error:
            raise Wrong(f"dcap-qvl refuses: {str(error)[:120]}", _FRESH) from error
        return str(report.status)


def verify(
    evidence: TdxEvidence, rules: TdxRules, at: datetime, expected: bytes | None, root: str = INTEL_ROOT
) -> tuple[Step, ...]:
    """Every step taken. Raises Refusal. `at` has a time zone; `expected` are the 64 bytes of report data.

    Without `expected`, step 13 is not checked: such a verdict says nothing about who sent the evidence.
    """
    return run(TDX, STEPS, _Case(evidence, rules, at, root, expected))


def is_dice(quote: bytes) -> bool:
    """Whether this is a CWT, as DICE quotes are."""
    return bool(quote) and quote[0] in _CBOR_TAGS


def _library() -> Any:
    try:
        import dcap_qvl
    except ModuleNotFoundError as error:
        raise Wrong("the package dcap-qvl is missing", "install it: pip install 'cleave[tdx]'") from error
    return dcap_qvl


def _format(case: _Case) -> str:  # step 1
    quote = case.evidence.quote
    if len(quote) > MAX_QUOTE_BYTES or is_dice(quote):
        raise Wrong("this is a DICE (CWT) quote, which is not supported", "ask the operator for an ECDSA (DCAP) quote")
    if len(quote) < MIN_QUOTE_BYTES:
        raise Wrong(f"{len(quote)} bytes are too few for a quote", "pass the quote alone, whole, or as hex")
    return f"{len(quote)} bytes"


def _type(case: _Case) -> str:  # step 2
    version, key, tee = struct.unpack_from("<HHI", case.evidence.quote)
    if version not in VERSIONS or key != ECDSA_P256:
        raise Wrong(f"version {version} with key type {key} is not known", "use a newer client, if it is newer")
    if tee != TEE_TDX:
        raise Wrong(f"TEE type {tee:#x} is not TDX", "pass a TDX quote: SGX enclaves are not supported")
    return f"version {version}, TDX"


def _signature(case: _Case) -> str:  # step 3
    return check_signature(case.evidence.quote, case.at, case.root)


def _debug(case: _Case) -> str:  # step 4
    if case.body.td_attributes[0]:
        raise Wrong("this is a debug TD: its host can read its memory", "never send anything to this machine")
    return "off"


def _collateral(case: _Case) -> str:  # step 5
    return f"in force, TCB {case.status}"


def _status(case: _Case) -> str:  # step 6
    if case.status not in case.rules.tcb_status:
        raise Wrong(
            f"the TCB is {case.status}, which the policy does not allow",
            "ask the operator to update the machine; allow the status only if you know what it leaves open",
        )
    return case.status


def _age(case: _Case) -> str:  # step 7
    days = (case.at - min(_issued(case.collateral))).total_seconds() / SECONDS_A_DAY
    if not 0 <= days <= case.rules.max_collateral_age_days:
        raise Wrong(
            f"the collateral is {days:.0f} days old, the policy allows {case.rules.max_collateral_age_days}", _FRESH
        )
    return f"{days:.0f} days"


def _issued(collateral: Any) -> list[datetime]:
    """When the parts that dcap-qvl verified were issued. Raises Wrong."""
    try:
        parts = (json.loads(one)["issueDate"] for one in (collateral.tcb_info, collateral.qe_identity))
        return [datetime.fromisoformat(one) for one in parts]
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong("the collateral does not say when it was issued", _FRESH) from error


def _attributes(case: _Case) -> str:  # step 8
    found = str(case.body.td_attributes.hex())
    if found != case.rules.td_attributes:
        raise Wrong(f"TDATTRIBUTES are {found}, not {case.rules.td_attributes}", _CHANGE)
    return found


def _seam(case: _Case) -> str:  # step 9
    return _listed(case.rules.mr_seam, case.body.mr_seam.hex())


def _td(case: _Case) -> str:  # step 10
    return _listed(case.rules.mr_td, case.body.mr_td.hex())


def _rtmrs(case: _Case) -> str:  # step 11
    seen = []
    for number, allowed in enumerate(case.rules.rtmrs):
        found = _listed(allowed, getattr(case.body, f"rt_mr{number}").hex(), f"RTMR{number} ")
        seen.append(f"RTMR{number} {'unchecked' if isinstance(found, NotChecked) else 'as listed'}")
    unchecked = all(rtmr.unchecked for rtmr in case.rules.rtmrs)
    return NotChecked("unchecked by the policy") if unchecked else ", ".join(seen)


def _config(case: _Case) -> str:  # step 12
    return _listed(case.rules.mr_config_id, case.body.mr_config_id.hex())


def _report_data(case: _Case) -> str:  # step 13
    if case.expected is None:
        return NotChecked("nothing was given to compare it with: this says nothing about who sent the evidence")
    if not hmac.compare_digest(case.expected, case.body.report_data):
        raise Wrong(
            "not what nonce, HPKE key and claims give: old evidence, or somebody else's",
            "connect again; if it stays so, somebody between you and the machine relays evidence",
        )
    return "as expected"


STEPS: tuple[tuple[str, Callable[[_Case], str]], ...] = (
    ("format", _format),
    ("version and TEE type", _type),
    ("signature", _signature),
    ("debug", _debug),
    ("collateral", _collateral),
    ("TCB status", _status),
    ("collateral age", _age),
    ("TDATTRIBUTES", _attributes),
    ("MRSEAM", _seam),
    ("MRTD", _td),
    ("RTMR", _rtmrs),
    ("MRCONFIGID", _config),
    ("report data", _report_data),
)


def _listed(allowed: AllowList, value: str, what: str = "") -> str:
    if allowed.unchecked:
        return NotChecked("unchecked by the policy")
    if not allowed.permits(value):
        raise Wrong(f"{what}{value} is not in the policy's list", "add it only if you can rebuild what was measured")
    return value
