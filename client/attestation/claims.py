"""Claims: what a trusted worker says of itself, bound by its evidence and matched here field by field."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from client.attestation.checklist import NotChecked, Step, Wrong, run
from client.attestation.rules import AllowList, ClaimRules
from wire.binding import CLAIMS, canonical

MAX_CLAIMS_BYTES = 1 << 14
_LISTS = ("insecure", "schemes")
_ADVICE = "connect to a worker that is set up as your policy wants, or change the policy if you meant to allow this"


@dataclass(frozen=True)
class _Case:
    rules: ClaimRules
    raw: bytes

    @cached_property
    def values(self) -> dict[str, Any]:
        return parse(self.raw)


def match(rules: ClaimRules, raw: bytes, provider: str, before: tuple[Step, ...] = ()) -> tuple[Step, ...]:
    """Match claims with the policy. Raises Refusal. The evidence must have been verified over these very bytes.

    `before` are the steps of that: see checklist.run.
    """
    return run(provider, STEPS, _Case(rules, raw), before)


def parse(raw: bytes) -> dict[str, Any]:
    """The claims: exactly those of wire.binding.CLAIMS, in canonical form. Raises Wrong."""
    if len(raw) > MAX_CLAIMS_BYTES:
        raise Wrong(f"the claims have more than {MAX_CLAIMS_BYTES} bytes", _ADVICE)
    try:
        values = json.loads(raw)
        well_formed = isinstance(values, dict) and canonical(values) == raw
    except (ValueError, RecursionError) as error:
        raise Wrong("the claims are not JSON", _ADVICE) from error
    if not well_formed or sorted(values) != sorted(CLAIMS):
        raise Wrong(f"the claims are not {', '.join(CLAIMS)} in canonical form", _ADVICE)
    for name, value in values.items():
        strings = value if name in _LISTS else [value]
        if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
            raise Wrong(f"the claim {name} is not text", _ADVICE)
    return dict(values)


def _form(case: _Case) -> str:
    return f"{len(case.values)} claims"


def _build(case: _Case) -> str:
    return _listed(case.rules.builds, case.values["build"])


def _config(case: _Case) -> str:
    return _listed(case.rules.config_digests, case.values["config_digest"])


def _model(case: _Case) -> str:
    return _listed(case.rules.model_digests, case.values["model_digest"])


def _schemes(case: _Case) -> str:
    if not case.values["schemes"]:
        raise Wrong("the worker permits no scheme", _ADVICE)
    return _within(case.rules.schemes, case.values["schemes"])


def _insecure(case: _Case) -> str:
    return _within(case.rules.insecure, case.values["insecure"])


STEPS: tuple[tuple[str, Callable[[_Case], str]], ...] = (
    ("claims", _form),
    ("claims: build", _build),
    ("claims: config_digest", _config),
    ("claims: model_digest", _model),
    ("claims: schemes", _schemes),
    ("claims: insecure", _insecure),
)


def _listed(allowed: AllowList, value: str) -> str:
    if allowed.unchecked:
        return NotChecked("unchecked by the policy")
    if not allowed.permits(value):
        raise Wrong(f"{value[:64]!r} is not in the policy's list", _ADVICE)
    return value


def _within(allowed: frozenset[str], values: list[str]) -> str:
    foreign = sorted(set(values) - allowed)
    if foreign:
        raise Wrong(f"the policy does not allow {', '.join(foreign)[:128]!r}", _ADVICE)
    return ", ".join(values) or "none"
