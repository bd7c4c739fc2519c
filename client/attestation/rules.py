"""What a policy file says, read and checked. Nothing here has a default that accepts anything.

Digests and other byte strings are lower-case hexadecimal text, as the file spells them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SEV_SNP = "sev-snp"
TDX = "tdx"
SIMULATED = "simulated"
PROVIDERS = (SEV_SNP, TDX, SIMULATED)


@dataclass(frozen=True)
class AllowList:
    """Values that are permitted. Empty permits nothing; only the file's word "unchecked" leaves a field unchecked."""

    values: frozenset[str] = frozenset()
    unchecked: bool = False

    def permits(self, value: str) -> bool:
        """Whether the value is in the list. An unchecked list permits nothing: ask `unchecked` first."""
        return value in self.values


@dataclass(frozen=True)
class ClaimRules:
    """What a trusted worker may say of itself."""

    builds: AllowList
    config_digests: AllowList
    model_digests: AllowList
    schemes: frozenset[str]  # every scheme that the worker permits must be one of these
    insecure: frozenset[str]  # every --insecure- switch that is on must be one of these


@dataclass(frozen=True)
class SnpRules:
    """What a SEV-SNP report must say. `min_tcb` has the parts of each permitted product."""

    products: frozenset[str]
    signers: frozenset[str]  # vcek, vlek
    vlek_csp_ids: AllowList
    chip_ids: AllowList
    vmpl: int
    min_abi: tuple[int, int]  # major, minor of the firmware
    min_tcb: Mapping[str, Mapping[str, int]]
    allow_provisional_firmware: bool
    require_crl: bool
    measurements: AllowList
    host_data: AllowList
    id_key_digests: AllowList
    author_key_digests: AllowList


@dataclass(frozen=True)
class TdxRules:
    """What a TDX quote must say. `rtmrs` are RTMR0 to RTMR3."""

    tcb_status: frozenset[str]
    max_collateral_age_days: int
    td_attributes: str  # 8 bytes, matched exactly
    mr_seam: AllowList
    mr_td: AllowList
    rtmrs: tuple[AllowList, ...]
    mr_config_id: AllowList


@dataclass(frozen=True)
class SimulatedRules:
    """A simulated TEE: protects from nobody. Its root is made afresh, and named here."""

    dev_root_sha256: str
    measurements: AllowList


@dataclass(frozen=True)
class Rules:
    """A policy file. A table is there if, and only if, its provider is accepted."""

    accept: frozenset[str]
    require_fresh_nonce: bool  # False: evidence over a nonce of the worker's own will do
    claims: ClaimRules
    sev_snp: SnpRules | None = None
    tdx: TdxRules | None = None
    simulated: SimulatedRules | None = None
