"""Who gets which evidence, and when it is made; claims in their one form."""

import asyncio
import hashlib
import json
import secrets
import threading
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.attestation.claims import match, parse
from client.attestation.rules import AllowList, ClaimRules
from tests.trusted_worker.fake_tsm import FakeTsm, evidence
from tests.trusted_worker.test_endorsements import VCEK, table
from trusted_worker import attestation
from trusted_worker.attestation import (
    AGAIN_SECONDS,
    CONFIG,
    KEPT,
    OWN_SECONDS,
    VERSION,
    Attestor,
    build,
    claims,
)
from trusted_worker.config import Settings
from trusted_worker.config import parse as parse_settings
from trusted_worker.tsm import Report
from wire.binding import NONCE_BYTES, canonical, report_data
from wire.errors import DeadlineError, ExhaustedError, InvalidArgumentError, PreconditionError, UnavailableError
from wire.v1 import trusted_worker_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


def settings(*flags: str) -> Settings:
    return parse_settings(["--model", "/models/m", "--gpu-worker", "unix:/nowhere", *flags])


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


class Rig:
    """An Attestor over a folder that a thread serves, with a clock, a key and claims to turn."""

    def __init__(self, served: FakeTsm, *flags: str) -> None:
        self.served, self.now, self.key, self.claims = served, 1000.0, b"k" * 32, b"{}"
        with_folder = settings("--evidence", "tsm", "--tsm-dir", str(served.folder), *flags)
        self.attestor = Attestor(with_folder, lambda: self.key, lambda: self.claims, lambda: self.now)

    async def ask(self, asked: bytes) -> pb.AttestResponse:
        """An answer whose evidence is over what it says."""
        answer = await self.attestor.attest(pb.AttestRequest(nonce=asked))
        data = report_data(answer.provider, answer.nonce, answer.hpke_key, answer.claims)
        assert answer.evidence == evidence(data)
        assert (answer.hpke_key, answer.claims) == (self.key, self.claims)
        assert answer.nonce == asked if asked else len(answer.nonce) == NONCE_BYTES
        return answer


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FakeTsm]:
    with FakeTsm(tmp_path / "report") as one:
        yield one


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


def test_an_ordinary_process_says_that_it_has_no_evidence() -> None:
    attestor = Attestor(settings(), lambda: b"key", lambda: b"claims")

    async def work() -> None:
        asked = nonce()
        answer = await attestor.attest(pb.AttestRequest(nonce=asked))
        assert answer == pb.AttestResponse(provider="none", nonce=asked, hpke_key=b"key", claims=b"claims")
        own = [(await attestor.attest(pb.AttestRequest())).nonce for _ in range(2)]
        assert [len(one) for one in own] == [NONCE_BYTES] * 2
        assert own[0] != own[1]

    run(work)


@pytest.mark.parametrize("size", [1, 16, 31, 33, 64])
@pytest.mark.parametrize("kind", ["none", "tsm"])
def test_a_nonce_of_another_size_is_refused(served: FakeTsm, size: int, kind: str) -> None:
    attestor = Rig(served).attestor if kind == "tsm" else Attestor(settings(), bytes, bytes)

    async def work() -> None:
        with pytest.raises(InvalidArgumentError, match="32 bytes, or empty"):
            await attestor.attest(pb.AttestRequest(nonce=bytes(size)))

    run(work)
    assert served.requests == []


@pytest.mark.parametrize(("name", "provider"), [("sev_guest", "sev-snp"), ("tdx_guest", "tdx")])
def test_evidence_binds_provider_nonce_key_and_claims(tmp_path: Path, name: str, provider: str) -> None:
    async def work() -> None:
        answer = await rig.ask(nonce())
        assert answer.provider == provider
        assert len(served.requests) == 1

    with FakeTsm(tmp_path / "report", name) as served:
        rig = Rig(served)
        run(work)


def test_certificates_and_collateral_travel_along(served: FakeTsm, tmp_path: Path) -> None:
    (tmp_path / "ark.der").write_bytes(b"\x30ark")
    (tmp_path / "list.crl").write_bytes(b"first")
    served.aux = table([(VCEK, b"\x30vcek")])
    flags = ["--certificates", str(tmp_path / "ark.der"), "--collateral", str(tmp_path / "list.crl")]
    rig = Rig(served, *flags)

    async def work() -> None:
        asked = nonce()
        answer = await rig.ask(asked)
        assert list(answer.certificates) == [b"\x30vcek", b"\x30ark"]
        assert list(answer.collateral) == [b"first"]
        (tmp_path / "list.crl").write_bytes(b"renewed")
        assert list((await rig.ask(asked)).collateral) == [b"renewed"]
        assert len(served.requests) == 1

    run(work)


def test_the_same_nonce_gets_the_same_evidence_for_a_minute(served: FakeTsm) -> None:
    rig = Rig(served)

    async def work() -> None:
        asked = nonce()
        first = await rig.ask(asked)
        rig.now += AGAIN_SECONDS - 1
        assert await rig.ask(asked) == first
        assert len(served.requests) == 1
        rig.now += 1
        await rig.ask(asked)
        assert len(served.requests) == 2
        await rig.ask(nonce())
        assert len(served.requests) == 3

    run(work)


def test_evidence_over_a_nonce_of_ours_is_made_once_an_hour(served: FakeTsm) -> None:
    rig = Rig(served)

    async def work() -> None:
        first = await rig.ask(b"")
        rig.now += OWN_SECONDS - 1
        assert await rig.ask(b"") == first
        rig.now += 1
        later = await rig.ask(b"")
        assert later.nonce != first.nonce
        assert len(served.requests) == 2

    run(work)


@pytest.mark.parametrize("asked", [b"", bytes(NONCE_BYTES)])
@pytest.mark.parametrize("what", ["key", "claims"])
def test_nothing_is_kept_over_a_change_of_key_or_claims(served: FakeTsm, asked: bytes, what: str) -> None:
    rig = Rig(served)

    async def work() -> None:
        first = await rig.ask(asked)
        setattr(rig, what, b"another")
        assert (await rig.ask(asked)).evidence != first.evidence
        assert len(served.requests) == 2

    run(work)


def test_few_answers_are_kept_and_ours_is_not_crowded_out(served: FakeTsm) -> None:
    rig = Rig(served)

    async def work() -> None:
        own = await rig.ask(b"")
        asked = [nonce() for _ in range(KEPT + 1)]
        for one in asked:
            await rig.ask(one)
        for one in (*asked[1:], b""):
            await rig.ask(one)
        assert len(served.requests) == KEPT + 2
        assert await rig.ask(b"") == own
        await rig.ask(asked[0])
        assert len(served.requests) == KEPT + 3
        assert len(rig.attestor._made) == KEPT + 1

    run(work)


def test_evidence_is_made_so_often_and_no_more(served: FakeTsm) -> None:
    rig = Rig(served, "--evidence-per-minute", "3")

    async def work() -> None:
        asked = nonce()
        for one in (asked, b"", nonce()):
            await rig.ask(one)
        for one in (nonce(), nonce()):
            with pytest.raises(ExhaustedError, match="too often; try again in 20 s"):
                await rig.ask(one)
        await rig.ask(asked)  # these were made before
        await rig.ask(b"")
        rig.now += 19
        with pytest.raises(ExhaustedError, match="too often"):
            await rig.ask(nonce())
        rig.now += 2
        await rig.ask(nonce())
        rig.now += 3600
        for _ in range(3):
            await rig.ask(nonce())
        with pytest.raises(ExhaustedError):
            await rig.ask(nonce())
        assert len(served.requests) == 7

    run(work)


def test_a_rate_of_zero_is_refused_at_the_start(served: FakeTsm) -> None:
    with pytest.raises(PreconditionError, match="--evidence-per-minute"):
        Rig(served, "--evidence-per-minute", "0")


def test_one_request_at_a_time_reaches_the_kernel(served: FakeTsm) -> None:
    rig = Rig(served)

    async def work() -> None:
        await asyncio.gather(*(rig.ask(nonce()) for _ in range(8)))

    run(work)
    assert len(served.requests) == 8
    assert served.at_once == 1
    assert served.left == []


@pytest.mark.parametrize("asked", [b"", bytes(NONCE_BYTES)])
def test_equal_requests_at_once_get_the_same(served: FakeTsm, asked: bytes) -> None:
    rig = Rig(served)

    async def work() -> None:
        answers = await asyncio.gather(*(rig.ask(asked) for _ in range(8)))
        assert answers == [answers[0]] * 8

    run(work)
    assert len(served.requests) == 1


class Stuck:
    """In the place of Tsm: the first report takes until it is let go."""

    def __init__(self) -> None:
        self.reports, self.go = list[bytes](), threading.Event()

    def report(self, data: bytes) -> Report:
        """See Tsm."""
        self.reports.append(data)
        self.go.wait(30)
        return Report("simulated", evidence(data), b"")


def test_a_stuck_kernel_ends_a_wait_and_builds_up_no_queue(served: FakeTsm, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, stuck = Rig(served), Stuck()
    monkeypatch.setattr(attestation, "DEADLINE_SECONDS", 0.05)
    rig.attestor._tsm = stuck  # type: ignore[assignment]

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(DeadlineError, match="not made in time"):
                await rig.ask(nonce())
        assert len(stuck.reports) == 1
        stuck.go.set()
        monkeypatch.setattr(attestation, "DEADLINE_SECONDS", 30)
        await rig.ask(nonce())
        assert len(stuck.reports) == 2

    run(work)


def test_a_failed_request_is_not_kept(served: FakeTsm) -> None:
    rig = Rig(served)
    served.foreign = 3

    async def work() -> None:
        asked = nonce()
        with pytest.raises(UnavailableError, match="somebody else"):
            await rig.ask(asked)
        await rig.ask(asked)

    run(work)


def test_a_provider_that_changes_is_refused(served: FakeTsm) -> None:
    rig = Rig(served)
    served.provider = "sev_guest"

    async def work() -> None:
        with pytest.raises(UnavailableError, match="provider of evidence changed"):
            await rig.ask(nonce())

    run(work)


def test_while_the_model_is_loading_there_is_no_evidence(served: FakeTsm) -> None:
    def loading() -> bytes:
        raise PreconditionError("model is loading; try again in a moment")

    rig = Rig(served)
    rig.attestor._claims = loading

    async def work() -> None:
        with pytest.raises(PreconditionError, match="loading"):
            await rig.ask(nonce())

    run(work)
    assert served.requests == []


@pytest.mark.parametrize("name", ["simulated", "sev_guest"])
def test_simulated_evidence_is_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    with FakeTsm(tmp_path / "report", name) as served:
        Rig(served)
    said = ["evidence is simulated: it proves nothing, and whoever runs this machine reads prompts"]
    assert caplog.messages == (said if name == "simulated" else [])


def test_without_the_folder_or_a_known_provider_it_does_not_start(tmp_path: Path) -> None:
    missing = settings("--evidence", "tsm", "--tsm-dir", str(tmp_path / "none"))
    with pytest.raises(PreconditionError, match="none is missing"):
        Attestor(missing, bytes, bytes)
    with FakeTsm(tmp_path / "report", "arm_cca_guest") as served, pytest.raises(PreconditionError, match="arm_cca"):
        Rig(served)


def test_claims_are_what_the_client_reads() -> None:
    given = settings("--scheme", "tee-only", "--insecure-unchecked-tiles", "--insecure-clear-adapter", "a=/adapter")
    found = parse(claims(given, bytes(range(32))))
    config = {name: getattr(given, name) for name in CONFIG}
    assert found == {
        "build": build(),
        "config_digest": hashlib.sha256(canonical(config)).hexdigest(),
        "insecure": ["--insecure-clear-adapter", "--insecure-unchecked-tiles"],
        "model_digest": bytes(range(32)).hex(),
        "schemes": ["tee-only"],
    }
    assert parse(claims(settings(), bytes(32)))["insecure"] == []
    rules = ClaimRules(
        builds=AllowList(frozenset([found["build"]])),
        config_digests=AllowList(frozenset([found["config_digest"]])),
        model_digests=AllowList(frozenset([found["model_digest"]])),
        schemes=frozenset(["tee-only"]),
        insecure=frozenset(found["insecure"]),
    )
    assert len(match(rules, claims(given, bytes(range(32))), "sev-snp")) == 6


def test_claims_in_their_golden_form() -> None:
    expected = (
        '{"build":"%s","config_digest":"%s","insecure":[],"model_digest":"%s","schemes":["secure-infer"]}'
    )  # fmt: skip
    config = (
        b'{"adapter_memory":0,"embed":"auto","kv_dtype":"float32","least_perturbation":0.0,"memory_budget":67108864,'
        b'"precision":"int8","prefill":"auto","projections":"gpu","rope":"trusted","rotate_every":0,"scheme":"secure-infer",'
        b'"seal_idle":false,"tee_profile":""}'
    )
    digests = build(), hashlib.sha256(config).hexdigest(), "ab" * 32
    assert claims(settings(), b"\xab" * 32).decode() == expected % digests


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (["--projections", "auto"], False),
        (["--listen", "127.0.0.1:1"], True),
        (["--spill-dir", "/elsewhere"], True),
        (["--step-seconds", "5"], True),
        (["--threads", "3"], True),
        (["--scheme", "tee-only"], False),
        (["--memory-budget", "32MiB"], False),
        (["--tee-profile", "trustzone"], False),
        (["--least-perturbation", "0.5"], False),
        (["--adapter-memory", "1MiB"], False),
    ],
)
def test_the_digest_of_settings_follows_those_that_matter(flags: list[str], same: bool) -> None:
    def digest(*given: str) -> Any:
        return json.loads(claims(settings(*given), bytes(32)))["config_digest"]

    assert (digest(*flags) == digest()) is same


def test_the_build_is_the_version_and_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    seen = set[str]()
    for folder in ("trusted_worker", "wire/v1", "client"):
        (tmp_path / folder).mkdir(parents=True)
    for change in ("trusted_worker/a.py", "wire/v1/b.py", "wire/c.py", "wire/c.txt", "client/d.py"):
        (tmp_path / change).write_text("x")
        monkeypatch.setattr(attestation, "__file__", str(tmp_path / "trusted_worker" / "attestation.py"))
        build.cache_clear()
        seen.add(build())
    monkeypatch.undo()
    build.cache_clear()
    assert len(seen) == 3
    assert all(one.startswith(f"cleave {VERSION} ") and len(one.split()[2]) == 64 for one in seen | {build()})
    content = b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (b"trusted_worker/a.py", b"x", b"wire/c.py", b"x", b"wire/v1/b.py", b"x")
    )
    assert f"cleave {VERSION} {hashlib.sha256(content).hexdigest()}" in seen
