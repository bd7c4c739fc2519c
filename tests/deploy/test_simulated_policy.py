"""The policy file that a cluster writes: the client's own reader takes it, and it replaces nobody else's."""

from pathlib import Path

import pytest

from client.attestation import policy_file
from deploy.local import simulated_policy
from wire.errors import InvalidArgumentError

ROOT, MEASUREMENT = "ab" * 32, "cd" * 48


def policy(root: str = ROOT) -> str:
    return simulated_policy.text(root, MEASUREMENT, "split", ["--insecure-clear-adapter", "--insecure-plaintext"])


def test_the_client_reads_it() -> None:
    rules = policy_file.read(policy())
    assert rules.accept == {"simulated"}
    assert rules.require_fresh_nonce
    assert rules.simulated is not None
    assert rules.simulated.dev_root_sha256 == ROOT
    assert rules.simulated.measurements.values == {MEASUREMENT}
    assert rules.claims.schemes == {"split"}
    assert rules.claims.insecure == {"--insecure-clear-adapter", "--insecure-plaintext"}
    assert policy_file.read(simulated_policy.text(ROOT, MEASUREMENT, "split", [])).claims.insecure == frozenset()


def test_it_is_private_and_replaces_its_like(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    simulated_policy.write(path, policy())
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    simulated_policy.write(path, policy("ef" * 32))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == policy("ef" * 32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.toml"]


def test_it_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(policy())
    (tmp_path / "policy.toml").symlink_to(tmp_path / "other.toml")
    simulated_policy.write(tmp_path / "policy.toml", policy("ef" * 32))
    assert (tmp_path / "other.toml").read_text() == policy()
    assert not (tmp_path / "policy.toml").is_symlink()


@pytest.mark.parametrize("content", ["", "version = 1\n", "# mine\n"])
def test_somebody_else_s_policy_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match="name another place"):
        simulated_policy.write(path, policy())
    assert path.read_text() == content


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "policy.toml", tmp_path, Path("/proc/policy.toml")):
        with pytest.raises(InvalidArgumentError, match="cannot be written"):
            simulated_policy.write(path, policy())
    assert not list(tmp_path.iterdir())
