"""The real workers with a simulated TEE: a session under the cluster's own policy, and under no other."""

import re
from collections.abc import Iterator

import pytest

from client.attestation import policy_file
from client.attestation.checklist import Refusal
from client.attestation.policy import Policy
from client.flags import DEMO_MODEL
from client.session import Request, connect
from client.terminal import quiet
from client.turn import Pacing
from deploy.local.cluster import Cluster, Settings
from wire.errors import UnauthenticatedError

SETTINGS = Settings(DEMO_MODEL, "tee-only", "int8", memory_budget="64MiB", simulated=True)
REQUEST = Request("demo", "tee-only", "int8", model_folder=DEMO_MODEL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(SETTINGS, quiet) as running:
        yield running


def rules_of(cluster: Cluster) -> str:
    assert cluster.policy is not None
    return cluster.policy.read_text()


def test_a_session_runs_under_the_policy_of_its_cluster(cluster: Cluster) -> None:
    with connect(cluster.target, Policy(rules=policy_file.read(rules_of(cluster)))) as worker:
        assert (worker.peer.provider, worker.peer.verified) == ("simulated", False)
        assert "report data" in {step.field for step in worker.peer.steps}
        session = worker.open(REQUEST)
        try:
            assert len(list(session.turn([1, 2, 3], Pacing(max_new_tokens=4)))) == 4
        finally:
            session.close()


def test_evidence_over_a_nonce_of_the_worker_s_own_is_enough_where_the_policy_says_so(cluster: Cluster) -> None:
    text = rules_of(cluster).replace("require_fresh_nonce = true", "require_fresh_nonce = false")
    with connect(cluster.target, Policy(rules=policy_file.read(text))) as worker:
        assert worker.peer.provider == "simulated"


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("pattern", "value", "field"),
    [
        (r'dev_root_sha256 = ".*"', f'dev_root_sha256 = "{"ab" * 32}"', "chain"),
        (r"measurements = .*", f'measurements = ["{"ab" * 48}"]', "measurement"),
        (r"schemes = .*", 'schemes = ["secure-infer"]', "claims: schemes"),
        (r"builds = .*", 'builds = ["another"]', "claims: build"),
        (r"model_digests = .*", f'model_digests = ["{"ab" * 32}"]', "claims: model_digest"),
    ],
)
def test_another_policy_refuses(cluster: Cluster, pattern: str, value: str, field: str) -> None:
    text, count = re.subn(pattern, value, rules_of(cluster))
    assert count == 1
    with pytest.raises(Refusal) as refused, connect(cluster.target, Policy(rules=policy_file.read(text))):
        pass
    assert refused.value.step.field == field


@pytest.mark.refusal
def test_without_a_policy_nothing_is_sent(cluster: Cluster) -> None:
    with pytest.raises(UnauthenticatedError, match="--policy"), connect(cluster.target, Policy(allow_unattested=True)):
        pass
