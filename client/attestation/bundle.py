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


def write(path: Path, provider: str, offer: Offer, at: datetime) -> None:
    """Save what was offered, whatever it is worth. Raises InvalidArgumentError when the file cannot be written."""
    values = {
        "bundle": _KIND,
        "time": at.isoformat(),
        "provider": provider,
        "nonce": offer.nonce.hex(),
        "hpke_key": offer.hpke_key.hex(),
        "evidence": _text(offer.evidence),
        "claims": _text(offer.claims),
        **{name: [_text(one) for one in getattr(offer, name)] for name in _LISTS},
    }
    try:
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="ascii")
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be written") from error


def read(data: bytes) -> tuple[str, Offer] | None:
    """Provider and offer; None when the bytes are no bundle at all. Raises InvalidArgumentError for a damaged one."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or "bundle" not in values:
        return None
    if set(values) != _FIELDS or values["bundle"] != _KIND or not isinstance(values["provider"], str):
        raise InvalidArgumentError("this bundle cannot be read: it has other fields, or is of another version")
    certificates, collateral = (_field(values, name, _several) for name in _LISTS)
    return values["provider"], Offer(
        _field(values, "nonce", _hexadecimal),
        _field(values, "evidence", _bytes),
        _field(values, "hpke_key", _hexadecimal),
        _field(values, "claims", _bytes),
        certificates,
        collateral,
    )


def _field(values: dict[str, Any], name: str, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(values[name])
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
