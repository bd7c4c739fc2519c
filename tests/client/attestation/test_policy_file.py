"""Policy files: every field is spelt, nothing else is taken, and an error says where it is."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.attestation.policy_file import MAX_POLICY_BYTES, load, read
from client.attestation.rules import AllowList
from client.attestation.snp_products import AMD_ROOTS
from client.attestation.toml_table import PolicyError
from tests.client.attestation.dev_pki import MEASUREMENT
from tests.client.attestation.policies import ALL, policy

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "attestation.md"
FIELDS = [line.partition(" =")[0] for line in ALL.splitlines() if " = " in line]


def line_of(text: str, line: str) -> int:
    return text.splitlines().index(line) + 1


def test_a_good_file_is_read() -> None:
    rules = read(ALL)
    assert rules.accept == {"sev-snp", "tdx", "simulated"}
    assert rules.sev_snp is not None
    assert rules.tdx is not None
    assert rules.simulated is not None
    assert rules.sev_snp.measurements == AllowList(frozenset({MEASUREMENT.hex()}))
    assert rules.sev_snp.min_tcb["Turin"] == {"fmc": 0, "bl": 0, "tee": 0, "snp": 0, "ucode": 0}
    assert (rules.sev_snp.min_abi, rules.sev_snp.host_data.unchecked) == ((1, 49), True)
    assert rules.tdx.rtmrs[2].permits(MEASUREMENT.hex())
    assert rules.claims.schemes == {"secure-infer", "tee-only"}
    assert rules.require_fresh_nonce
    assert not read(ALL.replace("nonce = true", "nonce = false")).require_fresh_nonce


def test_the_documented_file_is_read_and_names_every_field() -> None:
    example = DOCUMENT.read_text("utf-8").split("```toml\n", 1)[1].split("```", 1)[0]
    assert read(example).accept == {"sev-snp", "tdx", "simulated"}
    assert {line.partition(" =")[0] for line in example.splitlines() if " = " in line} == set(FIELDS)


@pytest.mark.parametrize("accept", ["sev-snp", "tdx", "simulated"])
def test_only_accepted_providers_have_rules(accept: str) -> None:
    rules = read(policy(accept))
    found = {"sev-snp": rules.sev_snp, "tdx": rules.tdx, "simulated": rules.simulated}
    assert {name for name, one in found.items() if one is not None} == {accept}


@pytest.mark.parametrize("number", [n for n, line in enumerate(ALL.splitlines()) if line])
def test_nothing_may_be_left_out(number: int) -> None:
    lines = ALL.splitlines()
    removed = lines.pop(number)
    with pytest.raises(PolicyError) as refused:
        read("\n".join(lines))
    if " = " in removed:
        assert removed.partition(" =")[0] in str(refused.value)


@pytest.mark.parametrize("number", [n for n, line in enumerate(ALL.splitlines()) if " = " in line])
def test_an_unknown_key_is_refused_by_line_and_name(number: int) -> None:
    lines = ALL.splitlines()
    lines.insert(number + 1, "surprise = 1")
    with pytest.raises(PolicyError, match=rf"line {number + 2}: .*surprise is not known"):
        read("\n".join(lines))


@pytest.mark.parametrize("line", [line for line in ALL.splitlines() if re.search(r"= (\[.+\]|\"unchecked\")$", line)])
def test_an_empty_list_refuses(line: str) -> None:
    empty = f"{line.partition(' =')[0]} = []"
    with pytest.raises(PolicyError, match=r"line \d+: .* is empty, which would refuse everything"):
        read(ALL.replace(line, empty, 1))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("nonce = true", "nonce = 1", "require_fresh_nonce must be true or false"),
        ("version = 1", "version = 2", "version must be a whole number from 1 to 1"),
        ("version = 1", "version = true", "version must be a whole number"),
        ('"tdx", ', '"none", ', "accept has an entry 'none'"),
        ('"tdx", ', "", "tdx has a table but is not in accept"),
        ('"Milan", ', "", "sev-snp.min_tcb.Milan is not known"),
        ('"Milan", ', '"Milan", "Genoa", ', "sev-snp.min_tcb.Genoa is missing"),
        ('"Milan", ', '"Rome", ', "products has an entry 'Rome'"),
        ('signers = ["vcek"]', 'signers = "vcek"', "signers must be a list"),
        ('signers = ["vcek"]', 'signers = ["vlek"]', "vlek_csp_ids is empty"),
        ("vlek_csp_ids = []", 'vlek_csp_ids = ["CN=x"]', "signers has no vlek"),
        ('chip_ids = "unchecked"', 'chip_ids = "any"', "chip_ids must be a list"),
        ('chip_ids = "unchecked"', 'chip_ids = ["00"]', "chip_ids has an entry '00'"),
        ("vmpl = 0", "vmpl = 4", "vmpl must be a whole number from 0 to 3"),
        ('min_abi = "1.49"', "min_abi = 1.49", "min_abi must be a firmware version"),
        ("require_crl = false", "require_crl = 0", "require_crl must be true or false"),
        (MEASUREMENT.hex(), MEASUREMENT.hex()[:-1], "measurements has an entry"),
        (f'["{MEASUREMENT.hex()}"]', '"unchecked"', "measurements must be a list"),
        ("ucode = 68", "ucode = 256", "ucode must be a whole number from 0 to 255"),
        ('["UpToDate"]', '["Revoked"]', "tcb_status has an entry 'Revoked'"),
        ("_days = 30", "_days = 0", "max_collateral_age_days must be"),
        ('"0000001000000000"', '"0100001000000000"', "allows a debug TD"),
        ('"0000001000000000"', '"0000001"', "td_attributes must be 8 bytes"),
        ("_secure = true", "_secure = false", "must be true, or simulated must leave accept"),
        ("ab" * 32, AMD_ROOTS["Milan"], "is the root of real hardware"),
        ("ab" * 32, "AB" * 32, "lower-case"),
        ("insecure = []", 'insecure = ["unchecked-tiles"]', "insecure has an entry"),
        ('"tee-only"', '"magic"', "schemes has an entry 'magic'"),
        ("[claims]", "[claim]", "claims is missing"),
        ("vmpl = 0", "vmpl =", "is not TOML.*line"),
        ("vmpl = 0", "vmpl = 0\nvmpl = 0", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, reason: str) -> None:
    assert before in ALL
    with pytest.raises(PolicyError, match=reason):
        read(ALL.replace(before, after, 1))


def test_the_line_is_that_of_the_field() -> None:
    text = ALL.replace("ucode = 68", "ucode = 999")
    with pytest.raises(PolicyError, match=rf"policy, line {line_of(text, 'ucode = 999')}: sev-snp.min_tcb.Milan.ucode"):
        read(text)


def test_a_table_of_another_kind_is_refused() -> None:
    with pytest.raises(PolicyError, match="must be a table"):
        read('version = 1\naccept = ["tdx"]\nrequire_fresh_nonce = true\nclaims = 1')


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ALL)
    assert load(path) == read(ALL)
    path.write_text(ALL.replace("vmpl = 0", "vmpl = 9"))
    with pytest.raises(PolicyError, match=r"^mine\.toml, line \d+: sev-snp\.vmpl"):
        load(path)
    path.write_bytes(b"#" * (MAX_POLICY_BYTES + 1))
    with pytest.raises(PolicyError, match="more than"):
        load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="cannot be read"):
        load(path)
    with pytest.raises(PolicyError, match="cannot be read"):
        load(tmp_path / "absent.toml")


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_is_refused_by_a_policy_error(text: str) -> None:
    with pytest.raises(PolicyError):
        read(text)


_VALUES = st.sampled_from(
    ["1", "-1", "0.5", "true", '""', '"unchecked"', "[]", '["x"]', "[[]]", "{}", "{a=1}", "1979-05-27", "[1]", "nan"]
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FIELDS), _VALUES)
def test_any_value_is_read_or_refused_by_a_policy_error(name: str, value: str) -> None:
    with contextlib.suppress(PolicyError):
        read(re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", ALL))
