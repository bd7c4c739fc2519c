"""What evidence binds: 64 bytes of report data over provider, nonce, HPKE key and claims. Both sides use this file.

    report_data = SHA-512(LABEL || lp(provider) || lp(nonce) || lp(HPKE public key) || SHA-256(claims))

lp(x) is the length of x as 4 bytes, big-endian, then x: no two different triples give the same bytes. SNP and TDX
reports have room for exactly 64 bytes. Claims are hashed as they travel, and they travel in one form only: `canonical`.
"""

import hashlib
import json
from collections.abc import Mapping

LABEL = b"cleave attestation v1\0"
NONCE_BYTES = 32
REPORT_DATA_BYTES = 64
# What a trusted worker says of itself: the model's and the settings' digests and the build as strings, then lists of
# strings: schemes that it permits, and --insecure- switches that are on.
CLAIMS = ("build", "config_digest", "insecure", "model_digest", "schemes")


def lp(part: bytes) -> bytes:
    """The part behind its length. Raises OverflowError from 4 GiB on."""
    return len(part).to_bytes(4, "big") + part


def canonical(claims: Mapping[str, object]) -> bytes:
    """JSON in one form: sorted keys, no white space, ASCII. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(claims, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def report_data(provider: str, nonce: bytes, hpke_key: bytes, claims: bytes) -> bytes:
    """The 64 bytes that evidence must carry. `claims` are the bytes that travel."""
    parts = lp(provider.encode()) + lp(nonce) + lp(hpke_key)
    return hashlib.sha512(LABEL + parts + hashlib.sha256(claims).digest()).digest()
