"""A saved answer to Attest: one JSON object, from which it can be judged again without the worker.

`bundle` is 1; `time` says when it was saved, and nothing binds it; `provider` is the name; `nonce` and `hpke_key` are
32 bytes in hexadecimal; `evidence` and `claims` are in base64; `certificates` and `collateral` are lists of base64.
"""

import base64
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from client.attestation.policy import Offer
from wire.errors import InvalidArgumentError

_KIND = 1
_LISTS = ("certificates", "collateral")
_FIELDS = {"bundle", "time", "provider", "nonce", "hpke_key", "evidence", "claims", *_LISTS}


def values(provider: str, offer: Offer, at: datetime) -> dict[str, Any]:
    """The object of what was offered, whatever it is worth."""
    return {
        "bundle": _KIND,
        "time": at.isoformat(),
        "provider": provider,
        "nonce": offer.nonce.hex(),
        "hpke_key": offer.hpke_key.hex(),
        "evidence": _text(offer.evidence),
        "claims": _text(offer.claims),
        **{name: [_text(one) for one in getattr(offer, name)] for name in _LISTS},
    }


def write(path: Path, provider: str, offer: Offer, at: datetime) -> None:
    """Save that object. Raises InvalidArgumentError when the file cannot be written."""
    try:
        path.write_text(json.dumps(values(provider, offer, at), indent=1) + "\n", encoding="ascii")
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be written") from error


def read(data: bytes) -> tuple[str, Offer] | None:
    """Provider and offer; None when the bytes are no bundle at all. Raises InvalidArgumentError for a damaged one."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "bundle" not in found:
        return None
    if set(found) != _FIELDS or found["bundle"] != _KIND or not isinstance(found["provider"], str):
        raise InvalidArgumentError("this bundle cannot be read: it has other fields, or is of another version")
    certificates, collateral = (_field(found, name, _several) for name in _LISTS)
    return found["provider"], Offer(
        _field(found, "nonce", _hexadecimal),
        _field(found, "evidence", _bytes),
        _field(found, "hpke_key", _hexadecimal),
        _field(found, "claims", _bytes),
        certificates,
        collateral,
    )


def _field(found: dict[str, Any], name: str, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(found[name])
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"this bundle cannot be read: its field {name} is damaged") from error


def _hexadecimal(value: str) -> bytes:
    found = bytes.fromhex(value)
    if len(found) != 32:
        raise ValueError("not 32 bytes")
    return found


def _several(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return tuple(map(_bytes, value))


def _bytes(value: str) -> bytes:
    return base64.b64decode(value, validate=True)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
