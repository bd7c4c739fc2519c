"""The text of a good policy file, and how tests change it."""

from typing import Any

from tests.client.attestation.dev_pki import MEASUREMENT

SNP = f"""
[sev-snp]
products = ["Milan", "Turin"]
signers = ["vcek"]
vlek_csp_ids = []
chip_ids = "unchecked"
vmpl = 0
min_abi = "1.49"
allow_provisional_firmware = false
require_crl = false
measurements = ["{MEASUREMENT.hex()}"]
host_data = "unchecked"
id_key_digests = "unchecked"
author_key_digests = "unchecked"

[sev-snp.min_tcb.Milan]
bl = 2
tee = 0
snp = 5
ucode = 68

[sev-snp.min_tcb.Turin]
fmc = 0
bl = 0
tee = 0
snp = 0
ucode = 0
"""
TDX = f"""
[tdx]
tcb_status = ["UpToDate"]
max_collateral_age_days = 30
td_attributes = "0000001000000000"
mr_seam = "unchecked"
mr_td = ["{MEASUREMENT.hex()}"]
rtmr0 = "unchecked"
rtmr1 = "unchecked"
rtmr2 = ["{MEASUREMENT.hex()}"]
rtmr3 = "unchecked"
mr_config_id = "unchecked"
"""
SIMULATED = f"""
[simulated]
i_understand_this_is_not_secure = true
dev_root_sha256 = "{"ab" * 32}"
measurements = ["{MEASUREMENT.hex()}"]
"""
CLAIMS = """
[claims]
builds = ["cleave 0.1.0"]
config_digests = "unchecked"
model_digests = ["0101010101010101010101010101010101010101010101010101010101010101"]
schemes = ["secure-infer", "tee-only"]
insecure = []
"""


def policy(*accept: str) -> str:
    """A whole file for some providers."""
    tables = {"sev-snp": SNP, "tdx": TDX, "simulated": SIMULATED}
    names = ", ".join(f'"{one}"' for one in accept)
    return (
        f"version = 1\naccept = [{names}]\nrequire_fresh_nonce = true\n{CLAIMS}{''.join(tables[one] for one in accept)}"
    )


ALL = policy("sev-snp", "tdx", "simulated")

GOOD_CLAIMS: dict[str, Any] = {
    "build": "cleave 0.1.0",
    "config_digest": "22" * 32,
    "insecure": [],
    "model_digest": "01" * 32,
    "schemes": ["secure-infer"],
}
