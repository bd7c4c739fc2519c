"""Steps 13 to 22 of SEV-SNP verification: the guest is what the policy wants. See snp.py for the list."""

import hmac
from collections.abc import Callable

from client.attestation import snp_report
from client.attestation.checklist import NotChecked, Wrong
from client.attestation.snp_case import CHANGE, Case, listed, show_parts
from client.attestation.snp_report import Report

_UPDATE = "ask the operator to update the machine's firmware; lower the policy's minimum only if you know why"


def _debug(case: Case) -> str:  # step 13
    if case.report.debug:
        raise Wrong("the guest runs in debug mode: its host can read its memory", "never send anything to this machine")
    return "off"


def _migration(case: Case) -> str:  # step 14
    if case.report.migration or _is_set(case.report.report_id_ma):
        raise Wrong("a migration agent may move the guest", "ask for a guest that is started without one")
    return "no agent"


def _vmpl(case: Case) -> str:  # step 15
    if case.report.vmpl != case.rules.vmpl:
        raise Wrong(f"the report was asked for at VMPL {case.report.vmpl}, not {case.rules.vmpl}", CHANGE)
    return str(case.report.vmpl)


def _abi(case: Case) -> str:  # step 16
    current, committed = (snp_report.firmware(one)[:2] for one in _firmwares(case.report))
    if min(current, committed) < case.rules.min_abi:
        least = ".".join(map(str, case.rules.min_abi))
        raise Wrong(f"firmware {_dotted(current)} (committed: {_dotted(committed)}) is older than {least}", _UPDATE)
    return f"firmware {_dotted(current)}, at least {_dotted(case.rules.min_abi)}"


def _minimum_tcb(case: Case) -> str:  # step 17
    least = case.rules.min_tcb.get(case.product)
    if least is None:
        raise Wrong(f"the policy has no minimum TCB for {case.product}", "add it to the policy")
    for name in ("current", "committed", "reported", "launch"):
        parts = case.tcb(getattr(case.report, f"{name}_tcb"))
        low = [part for part, number in parts.items() if number < least.get(part, 256)]  # a part left out: refused
        if low:
            raise Wrong(f"the {name} TCB is below the minimum in {', '.join(low)}: {show_parts(parts)}", _UPDATE)
    return f"at least {show_parts(least)}"


def _provisional(case: Case) -> str:  # step 18
    if case.rules.allow_provisional_firmware:
        return NotChecked("the policy allows provisional firmware")
    current, committed = map(snp_report.firmware, _firmwares(case.report))
    now, kept = case.tcb(case.report.current_tcb), case.tcb(case.report.committed_tcb)
    differs = [part for part in now if (now[part] < kept[part] if part == "ucode" else now[part] != kept[part])]
    if current != committed or differs:
        raise Wrong("the machine runs firmware that is not committed and can be rolled back", _UPDATE)
    return f"none: {_dotted(current)} is committed"


def _measurement(case: Case) -> str:  # step 19
    measured = case.report.measurement.hex()
    if not case.rules.measurements.permits(measured):
        raise Wrong(f"{measured} is not in the policy's list", "add it only if you built, or can rebuild, that image")
    return measured


def _host_data(case: Case) -> str:  # step 20
    return listed(case.rules.host_data, case.report.host_data.hex(), "the host data")


def _id_keys(case: Case) -> str:  # step 21
    report, rules = case.report, case.rules
    seen = [
        listed(rules.id_key_digests, report.id_key_digest.hex(), "the id key"),
        listed(rules.author_key_digests, report.author_key_digest.hex(), "the author key"),
    ]
    if not rules.author_key_digests.unchecked and not report.author_key_enabled:
        raise Wrong("no author key signed the id key, and the policy names one", CHANGE)
    checked = [one for one in seen if not isinstance(one, NotChecked)]
    return "; ".join(checked) if checked else NotChecked("; ".join(seen))


def _report_data(case: Case) -> str:  # step 22
    if case.expected is None:
        return NotChecked("nothing was given to compare it with: this says nothing about who sent the evidence")
    if not hmac.compare_digest(case.expected, case.report.report_data):
        raise Wrong(
            "not what nonce, HPKE key and claims give: old evidence, or somebody else's",
            "connect again; if it stays so, somebody between you and the machine relays evidence",
        )
    return "as expected"


def _is_set(report_id: bytes) -> bool:
    """Whether a migration agent's report id is one: firmware writes all ones where there is none."""
    return report_id not in (b"\xff" * 32, bytes(32))


def _firmwares(report: Report) -> tuple[bytes, bytes]:
    return report.current_firmware, report.committed_firmware


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


STATE: tuple[tuple[str, Callable[[Case], str]], ...] = (
    ("debug", _debug),
    ("migration", _migration),
    ("VMPL", _vmpl),
    ("ABI", _abi),
    ("minimum TCB", _minimum_tcb),
    ("provisional firmware", _provisional),
    ("measurement", _measurement),
    ("host data", _host_data),
    ("id keys", _id_keys),
    ("report data", _report_data),
)
