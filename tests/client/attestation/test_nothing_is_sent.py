"""A peer that fails one check receives a nonce, and nothing else: no frame of any call, so no byte of a prompt.

The peer speaks the whole protocol and records what comes; its evidence has AMD's form, under a root that is pinned for
these tests in the place of AMD's. The first test shows that the same peer gets the prompt when nothing is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import grpc
import pytest

from client.attestation import policy_file
from client.attestation.examine import MARKER
from client.attestation.policy import Policy
from client.attestation.snp_products import AMD_ROOTS
from client.session import Request, connect
from client.turn import Pacing
from tests.client.attestation import policies
from tests.client.attestation.dev_pki import Pki, evidence, hardware_id
from tests.client.attestation.policies import GOOD_CLAIMS
from tests.client.fake_worker import EOS, FakeWorker, Script
from wire.binding import canonical, report_data
from wire.errors import DeniedError, UnauthenticatedError
from wire.v1 import trusted_worker_pb2 as pb

PROMPT = list(range(40, 60))
REQUEST = Request("tiny", "secure-infer", "int8")
HARDWARE = policies.policy("sev-snp")


@dataclass
class Story:
    """What the peer says, and what of it is not so."""

    provider: str = "sev-snp"
    fields: dict[str, Any] = field(default_factory=dict)  # of the report
    claims: bytes = canonical(GOOD_CLAIMS)
    nonce: bytes | None = None  # bound in the place of the client's
    key: bytes | None = None  # the same of the key
    last: Callable[[pb.AttestResponse], None] = lambda answer: None


class Attested(FakeWorker):
    """A worker with evidence."""

    def __init__(self, pki: Pki, story: Story) -> None:
        self.pki, self.story = pki, story
        super().__init__(Script(answers=[[5, EOS]]))

    def Attest(self, request: pb.AttestRequest, context: grpc.ServicerContext) -> pb.AttestResponse:
        self.nonces.append(request.nonce)
        story, key = self.story, self.receiver.public_key
        bound = report_data(story.provider, story.nonce or request.nonce, story.key or key, story.claims)
        made = evidence(self.pki, **{"report_data": bound, **story.fields})
        answer = pb.AttestResponse(
            provider=story.provider,
            evidence=made.report,
            nonce=request.nonce,
            hpke_key=key,
            claims=story.claims,
            certificates=made.certificates,
        )
        story.last(answer)
        return answer


def talk(pki: Pki, story: Story, policy: str = HARDWARE, host: str = "127.0.0.1", pinned: bool = True) -> Attested:
    """A client that wants to say PROMPT; the peer as it is afterwards. Raises what the client raises, as `error`."""
    worker = Attested(pki, story)
    rules = policy_file.read(policy.replace("ab" * 32, pki.roots["Milan"]))
    roots = {"Milan": pki.roots["Milan"]} if pinned else {}
    try:
        with mock.patch.dict(AMD_ROOTS, roots), connect(f"{host}:{worker.port}", Policy(rules=rules)) as trusted:
            session = trusted.open(REQUEST)
            assert [token.token_id for token in session.turn(PROMPT, Pacing())] == [5, EOS]
            session.close()
    except (UnauthenticatedError, DeniedError) as error:
        worker.error = error
    finally:
        worker.stop()
    return worker


def claims(**changes: Any) -> bytes:
    return canonical({**GOOD_CLAIMS, **changes})


def set_field(name: str, value: Any) -> Callable[[pb.AttestResponse], None]:
    return lambda answer: setattr(answer, name, value)


def flip(at: int) -> Callable[[pb.AttestResponse], None]:
    def change(answer: pb.AttestResponse) -> None:
        report = bytearray(answer.evidence)
        report[at] ^= 1
        answer.evidence = bytes(report)

    return change


def drop_certificates(answer: pb.AttestResponse) -> None:
    del answer.certificates[:]


PINNED = HARDWARE.replace('chip_ids = "unchecked"', f'chip_ids = ["{"77" * 64}"]')
OPERATOR = HARDWARE.replace('host_data = "unchecked"', f'host_data = ["{"99" * 32}"]')
LISTED = PINNED.replace("77" * 64, hardware_id("Milan").hex())

# story, policy, and the step that must refuse
CASES: dict[str, tuple[Story, str, str]] = {
    "wrong measurement": (Story(fields={"measurement": b"\7" * 48}), HARDWARE, "measurement"),
    "replayed nonce": (Story(nonce=b"o" * 32), HARDWARE, "report data"),
    "other HPKE key": (Story(key=b"k" * 32), HARDWARE, "report data"),
    "key swapped on the way": (Story(last=set_field("hpke_key", b"k" * 32)), HARDWARE, "report data"),
    "evidence bound to nothing": (Story(fields={"report_data": bytes(64)}), HARDWARE, "report data"),
    "claims swapped on the way": (Story(last=set_field("claims", claims(build="x"))), HARDWARE, "report data"),
    "debug guest": (Story(fields={"policy": 0xB0000}), HARDWARE, "debug"),
    "guest that may migrate": (Story(fields={"policy": 0x70000}), HARDWARE, "migration"),
    "another VMPL": (Story(fields={"vmpl": 1}), HARDWARE, "VMPL"),
    "old TCB": (Story(), HARDWARE.replace("ucode = 68", "ucode = 255"), "minimum TCB"),
    "old firmware": (Story(), HARDWARE.replace('min_abi = "1.49"', 'min_abi = "1.99"'), "ABI"),
    "relayed, chip ids pinned": (Story(), PINNED, "chip id"),
    "relayed, host data pinned": (Story(), OPERATOR, "host data"),
    "claims: another build": (Story(claims=claims(build="cleave 0.0.9")), HARDWARE, "claims: build"),
    "claims: another model": (Story(claims=claims(model_digest="02" * 32)), HARDWARE, "claims: model"),
    "claims: a scheme too many": (Story(claims=claims(schemes=["secure-infer", "split"])), HARDWARE, "claims: schemes"),
    "claims: an insecure switch": (
        Story(claims=claims(insecure=["--insecure-unchecked-tiles"])),
        HARDWARE,
        "claims: insecure",
    ),
    "claims that are none": (Story(claims=b"{}"), HARDWARE, "claims"),
    "a flipped bit": (Story(last=flip(0x90)), HARDWARE, "report signature"),
    "a flipped bit of the signature": (Story(last=flip(0x2A0)), HARDWARE, "report signature"),
    "no evidence": (Story(last=set_field("evidence", b"")), HARDWARE, "size"),
    "half a report": (Story(last=set_field("evidence", bytes(592))), HARDWARE, "size"),
    "no certificates": (Story(last=drop_certificates), HARDWARE, "chain"),
    "provider none": (Story(provider="none"), HARDWARE, "provider"),
    "simulated, under a policy for hardware": (
        Story(provider="simulated", fields={"family_id": MARKER}),
        HARDWARE,
        "provider",
    ),
    "hardware, under a policy for the simulator": (Story(), policies.policy("simulated"), "provider"),
    "simulated, without the marker": (Story(provider="simulated"), policies.policy("simulated"), "provider"),
}


def test_a_peer_that_proves_itself_gets_the_prompt(pki: Pki) -> None:
    worker = talk(pki, Story())
    assert [list(frame.token_ids) for frame in worker.frames if frame.token_ids] == [PROMPT]
    worker = talk(pki, Story(), LISTED)
    assert worker.frames


def test_a_simulated_peer_on_this_machine_gets_the_prompt(pki: Pki) -> None:
    story = Story(provider="simulated", fields={"family_id": MARKER})
    assert talk(pki, story, policies.policy("simulated")).frames


@pytest.mark.refusal
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_sent_to_a_peer_that_fails(pki: Pki, name: str) -> None:
    story, policy, step = CASES[name]
    worker = talk(pki, story, policy)
    assert getattr(worker.error, "step", None) is not None, worker.error
    assert worker.error.step.field.startswith(step), worker.error
    assert (len(worker.nonces), worker.sealed, worker.frames, worker.opened) == (1, [], [], [])


@pytest.mark.refusal
def test_nothing_is_sent_under_the_vendors_own_root(pki: Pki) -> None:
    """Evidence of the development root, and a policy for AMD's."""
    worker = talk(pki, Story(), pinned=False)
    assert worker.error.step.field == "chain"
    assert (worker.sealed, worker.frames) == ([], [])


@pytest.mark.refusal
def test_nothing_is_sent_to_a_simulated_peer_elsewhere(pki: Pki) -> None:
    """The name is one that a resolver may lead anywhere."""
    story = Story(provider="simulated", fields={"family_id": MARKER})
    worker = talk(pki, story, policies.policy("simulated"), host="dns:///localhost")
    assert isinstance(worker.error, DeniedError)
    assert (worker.sealed, worker.frames) == ([], [])


@pytest.mark.refusal
@pytest.mark.parametrize("key", [b"", b"k" * 31, bytes(32)], ids=["none", "short", "of low order"])
def test_nothing_is_sent_for_a_key_that_is_none(pki: Pki, key: bytes) -> None:
    worker = talk(pki, Story(key=key or b"\0", last=set_field("hpke_key", key)))
    assert isinstance(worker.error, UnauthenticatedError)
    assert (worker.sealed, worker.frames) == ([], [])
