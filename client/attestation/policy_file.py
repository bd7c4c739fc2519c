"""Policy files: TOML in which every field is spelt. docs/attestation.md describes them; `read` refuses all else.

A table is there for each accepted provider and for no other. An empty list is refused here, and would refuse
everything in the verifier; the only way to leave a field unchecked is the word "unchecked", where it is offered.
"""

import tomllib
from pathlib import Path

from client.attestation.rules import (
    PROVIDERS,
    SEV_SNP,
    SIMULATED,
    TDX,
    AllowList,
    ClaimRules,
    Rules,
    SimulatedRules,
    SnpRules,
    TdxRules,
)
from client.attestation.snp_products import AMD_ROOTS, PRODUCTS, TCB_LAYOUTS
from client.attestation.toml_table import PolicyError, Table

VERSION = 1
MAX_POLICY_BYTES = 1 << 20
MEASUREMENT_BYTES, DIGEST_BYTES = 48, 32
MAX_COLLATERAL_DAYS = 366
SCHEMES = ("secure-infer", "kv-shield", "split", "plain", "tee-only")
TCB_STATUS = (  # Revoked is never accepted
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
TD_DEBUG_MASK = 0xFF  # the first byte of TDATTRIBUTES: group TUD, bits that take away protection
_NAME = r"[ -~]{1,128}"


def load(path: Path) -> Rules:
    """The rules in a file. Raises PolicyError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_POLICY_BYTES + 1)
        if len(raw) > MAX_POLICY_BYTES:
            raise PolicyError(f"{path.name} has more than {MAX_POLICY_BYTES} bytes")
        return read(raw.decode("utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the policy file {path} cannot be read") from error


def read(text: str, file: str = "policy") -> Rules:
    """The rules in the text of a file. Raises PolicyError with line and field."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PolicyError(f"{file} is not TOML: {error}") from error
    top = Table("", values, text, file)
    top.number("version", VERSION, VERSION)
    accept = top.choices("accept", PROVIDERS)
    for provider in PROVIDERS:
        if provider not in accept and top.has(provider):
            raise top.error(provider, "has a table but is not in accept: remove one, or add the other")
    rules = Rules(
        accept,
        top.truth("require_fresh_nonce"),
        _claims(top.table("claims")),
        _snp(top.table(SEV_SNP)) if SEV_SNP in accept else None,
        _tdx(top.table(TDX)) if TDX in accept else None,
        _simulated(top.table(SIMULATED)) if SIMULATED in accept else None,
    )
    top.done()
    return rules


def _claims(table: Table) -> ClaimRules:
    rules = ClaimRules(
        builds=table.allow_list("builds", _NAME, "a build's name"),
        config_digests=table.digests("config_digests", DIGEST_BYTES),
        model_digests=table.digests("model_digests", DIGEST_BYTES),
        schemes=table.choices("schemes", SCHEMES),
        insecure=table.words("insecure", r"--insecure-[a-z-]{1,64}", "a switch, --insecure-..."),
    )
    table.done()
    return rules


def _snp(table: Table) -> SnpRules:
    products = table.choices("products", PRODUCTS)
    signers = table.choices("signers", ("vcek", "vlek"))
    abi = table.text("min_abi", r"\d{1,3}\.\d{1,3}", "a firmware version as in 1.55")
    rules = SnpRules(
        products=products,
        signers=signers,
        vlek_csp_ids=_csp_ids(table, signers),
        chip_ids=table.allow_list("chip_ids", r"[0-9a-f]{16}|[0-9a-f]{128}", "64 bytes (Turin: 8) in hexadecimal"),
        vmpl=table.number("vmpl", 0, 3),
        min_abi=(int(abi.partition(".")[0]), int(abi.partition(".")[2])),
        min_tcb=_min_tcb(table.table("min_tcb"), products),
        allow_provisional_firmware=table.truth("allow_provisional_firmware"),
        require_crl=table.truth("require_crl"),
        measurements=table.digests("measurements", MEASUREMENT_BYTES, may_be_unchecked=False),
        host_data=table.digests("host_data", DIGEST_BYTES),
        id_key_digests=table.digests("id_key_digests", MEASUREMENT_BYTES),
        author_key_digests=table.digests("author_key_digests", MEASUREMENT_BYTES),
    )
    table.done()
    return rules


def _csp_ids(table: Table, signers: frozenset[str]) -> AllowList:
    """Names of cloud providers: needed for VLEKs, and empty without them."""
    if "vlek" in signers:
        return table.allow_list("vlek_csp_ids", _NAME, "a provider's name", may_be_unchecked=False)
    if table.words("vlek_csp_ids", _NAME, "a provider's name"):
        raise table.error("vlek_csp_ids", "names providers, but signers has no vlek")
    return AllowList()


def _min_tcb(table: Table, products: frozenset[str]) -> dict[str, dict[str, int]]:
    """Every part of the TCB of every accepted product."""
    found = {}
    for product in sorted(products):
        parts = table.table(product)
        found[product] = {part: parts.number(part, 0, 255) for part in TCB_LAYOUTS[product] if part}
        parts.done()
    table.done()
    return found


def _tdx(table: Table) -> TdxRules:
    rules = TdxRules(
        tcb_status=table.choices("tcb_status", TCB_STATUS),
        max_collateral_age_days=table.number("max_collateral_age_days", 1, MAX_COLLATERAL_DAYS),
        td_attributes=table.hexadecimal("td_attributes", 8),
        mr_seam=table.digests("mr_seam", MEASUREMENT_BYTES),
        mr_td=table.digests("mr_td", MEASUREMENT_BYTES, may_be_unchecked=False),
        rtmrs=tuple(table.digests(f"rtmr{number}", MEASUREMENT_BYTES) for number in range(4)),
        mr_config_id=table.digests("mr_config_id", MEASUREMENT_BYTES),
    )
    if bytes.fromhex(rules.td_attributes)[0] & TD_DEBUG_MASK:
        raise table.error("td_attributes", "allows a debug TD, whose host can read its memory: never accepted")
    table.done()
    return rules


def _simulated(table: Table) -> SimulatedRules:
    if not table.truth("i_understand_this_is_not_secure"):
        raise table.error("i_understand_this_is_not_secure", "must be true, or simulated must leave accept")
    rules = SimulatedRules(
        dev_root_sha256=table.hexadecimal("dev_root_sha256", DIGEST_BYTES),
        measurements=table.digests("measurements", MEASUREMENT_BYTES, may_be_unchecked=False),
    )
    if rules.dev_root_sha256 in AMD_ROOTS.values():
        raise table.error("dev_root_sha256", "is the root of real hardware: name the root of the simulator")
    table.done()
    return rules
