"""`cleave attest`: lines, JSON and exit status; files that make no sense; measurements as policy entries."""

import hashlib
import json
import struct
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.__main__ import main
from client.attestation import azure
from client.attestation.checklist import NOT_CHECKED
from client.attestation.examine import MARKER
from client.attestation.policy_file import read
from client.attestation.snp_products import AMD_ROOTS
from tests.client.attestation import policies
from tests.client.attestation.dev_pki import Pki, evidence
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig

Output = pytest.CaptureFixture[str]
AT = "2025-06-01"


@pytest.fixture
def folder(pki: Pki, tmp_path: Path) -> Path:
    """Evidence of a simulator, its certificates in one PEM-free pile, and a policy that names its root."""
    made = evidence(pki, family_id=MARKER)
    (tmp_path / "report.bin").write_bytes(made.report)
    (tmp_path / "report.hex").write_text(made.report.hex() + "\n")
    for number, certificate in enumerate(made.certificates):
        (tmp_path / f"{number}.der").write_bytes(certificate)
    text = policies.policy("simulated", "sev-snp", "tdx").replace("ab" * 32, pki.roots["Milan"])
    (tmp_path / "policy.toml").write_text(text)
    return tmp_path


def attest(folder: Path, name: str = "report.bin", *more: str) -> int:
    certs = [str(folder / f"{number}.der") for number in range(3)]
    files = ["--evidence", str(folder / name), "--certs", *certs, "--policy", str(folder / "policy.toml")]
    return main(["attest", "verify", *files, "--at", AT, *more])


@pytest.mark.parametrize("name", ["report.bin", "report.hex"])
def test_accepted_evidence_has_a_line_for_each_step(folder: Path, capsys: Output, name: str) -> None:
    assert attest(folder, name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:22]] == [str(number) for number in range(1, 23)]
    assert "SIMULATED" in lines[-2]
    assert lines[-1].startswith("accepted; not checked: 4 of the steps")


def test_json_has_every_step(folder: Path, capsys: Output) -> None:
    assert attest(folder, "report.bin", "--json", "--report-data", bytes(range(64)).hex()) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["provider"], result["advice"]) == ("accepted", "simulated", None)
    assert result["at"] == "2025-06-01T00:00:00+00:00"
    assert [step["number"] for step in result["steps"]] == list(range(1, 23))
    assert {step["field"] for step in result["steps"] if step["verdict"] == NOT_CHECKED} == {
        "revocation", "host data", "id keys",
    }  # fmt: skip


@pytest.mark.refusal
def test_refused_evidence_names_the_step(folder: Path, capsys: Output) -> None:
    assert attest(folder, "report.bin", "--report-data", "00" * 64) == 1
    assert "refused at step 22, report data: connect again" in capsys.readouterr().out
    assert attest(folder, "report.bin", "--at", "2031-01-01", "--json") == 1
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["steps"][-1]["field"]) == ("refused", "validity")
    assert "--at" in result["advice"]


@pytest.mark.refusal
def test_a_report_cut_off_is_refused_by_its_size(folder: Path, capsys: Output) -> None:
    (folder / "cut.bin").write_bytes((folder / "report.bin").read_bytes()[:1000])
    assert attest(folder, "cut.bin") == 1
    assert "refused at step 1, size" in capsys.readouterr().out


@pytest.mark.refusal
def test_what_looks_like_a_quote_is_judged_as_one(folder: Path, capsys: Output) -> None:
    (folder / "quote").write_bytes(b"\4\0\2\0\x81\0\0\0" + bytes(1000))
    assert attest(folder, "quote") == 1
    assert "refused at step 3, signature" in capsys.readouterr().out
    (folder / "quote").write_bytes(b"\xd2\x84" + bytes(1000))
    assert attest(folder, "quote") == 1
    assert "DICE" in capsys.readouterr().out


@pytest.mark.refusal
@pytest.mark.parametrize("wrapped", [False, True])
def test_azure_is_refused_although_the_report_inside_is_good(
    pki: Pki, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    runtime = b'{"keys":[]}'
    inside = evidence(pki, report_data=hashlib.sha256(runtime).digest() + bytes(32)).report
    hcl = azure.MAGIC + bytes(28) + inside + struct.pack("<5I", 20 + len(runtime), 1, 2, 1, len(runtime)) + runtime
    (folder / "policy.toml").write_text(policies.policy("sev-snp"))
    (folder / "azure").write_bytes(json.dumps({"report": list(hcl)}).encode() if wrapped else hcl)
    monkeypatch.setitem(AMD_ROOTS, "Milan", pki.roots["Milan"])
    assert attest(folder, "azure") == 1
    out = capsys.readouterr().out
    assert " 22  passed       report data" in out
    assert "refused at step 23, Azure vTPM" in out
    (folder / "azure").write_bytes(hcl[:-1])
    assert attest(folder, "azure") == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--at", "someday"], "must be a date"),
        (["--report-data", "00"], "must be 64 bytes"),
        (["--policy"], "expected one argument"),
    ],
)
def test_usage(folder: Path, capsys: Output, more: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as left:
        attest(folder, "report.bin", *more)
    assert left.value.code == 2
    assert reason in capsys.readouterr().err


def test_files_that_make_no_sense(folder: Path, capsys: Output) -> None:
    assert attest(folder, "absent") == 2
    assert "absent cannot be read" in capsys.readouterr().err
    (folder / "empty").write_bytes(b"")
    assert attest(folder, "empty") == 2
    (folder / "other.json").write_text('{"a": 1}')
    assert attest(folder, "other.json") == 2
    (folder / "policy.toml").write_text("version = 1\naccept = []\n")
    assert attest(folder) == 2
    assert "policy.toml, line 2: accept is empty" in capsys.readouterr().err.splitlines()[-1]


def ovmf(path: Path) -> Path:
    """The least firmware that sev-snp-measure reads: one page, its footer table and the SEV metadata."""
    reset = struct.pack("<I", 0x80B004)
    image = bytearray(4096)
    metadata = b"ASEV" + struct.pack("<III", 16 + 12, 1, 1) + struct.pack("<III", 0x800000, 4096, 1)
    image[: len(metadata)] = metadata
    entries = b""
    for text, data in (
        ("00f771de-1a7e-4fcb-890e-68c77e2fb44e", reset),
        ("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", 4096)),
    ):
        entries += data + struct.pack("<H", len(data) + 18) + uuid.UUID(text).bytes_le
    footer = struct.pack("<H", len(entries) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    end = 4096 - 32
    image[end - len(entries) - 18 : end] = entries + footer
    path.write_bytes(image)
    return path


def measure(*flags: str) -> int:
    return main(["attest", "measure", *flags])


def test_a_measurement_is_an_entry_that_a_policy_takes(tmp_path: Path, capsys: Output) -> None:
    pytest.importorskip("sevsnpmeasure")
    image = ovmf(tmp_path / "ovmf.fd")
    assert measure("--ovmf", str(image), "--vcpus", "2") == 0
    entry = capsys.readouterr().out
    assert f"# ovmf: sha256 {hashlib.sha256(image.read_bytes()).hexdigest()}" in entry
    line = entry.splitlines()[-1]
    rules = read(policies.ALL.replace(f'measurements = ["{"11" * 48}"]', line, 1))
    assert rules.sev_snp is not None
    assert rules.sev_snp.measurements.values == {line.split('"')[1]}
    assert measure("--ovmf", str(image), "--vcpus", "2", "--output", str(tmp_path / "entry")) == 0
    assert (tmp_path / "entry").read_text() == entry
    assert measure("--ovmf", str(image), "--vcpus", "3") == 0
    assert capsys.readouterr().out.splitlines()[-1] != line


def test_what_cannot_be_measured(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sevsnpmeasure")
    image, other = str(ovmf(tmp_path / "ovmf.fd")), tmp_path / "other"
    other.write_bytes(bytes(4096))
    for flags, reason in (
        (["--ovmf", str(tmp_path / "absent"), "--vcpus", "1"], "cannot be read"),
        (["--ovmf", str(other), "--vcpus", "1"], "cannot be measured"),
        (["--ovmf", image, "--vcpus", "1", "--vcpu-type", "Z80"], "--vcpu-type must be one of"),
        (["--ovmf", image, "--vcpus", "1", "--append", "x"], "with --kernel only"),
        (["--ovmf", image, "--vcpus", "1", "--output", str(tmp_path / "no" / "folder")], "cannot be written"),
    ):
        assert measure(*flags) == 2
        assert reason in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sevsnpmeasure", None)
    assert measure("--ovmf", image, "--vcpus", "1") == 2
    assert "pip install 'cleave[measure]'" in capsys.readouterr().err


def test_the_digest_of_a_model_is_an_entry_that_a_policy_takes(
    model_folder: Callable[[str], Path], capsys: Output
) -> None:
    folder = model_folder("llama")
    digest = MeasuredCheckpoint(folder, ModelConfig.from_hf(folder)).model_digest.hex()
    assert main(["attest", "model", "--model", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == ["[claims]", "# llama", f'model_digests = ["{digest}"]']
    text = policies.policy("simulated").replace("01" * 32, digest)
    assert read(text).claims.model_digests.values == {digest}
    assert main(["attest", "model", "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "llama", "model_digest": digest}


def test_models_without_a_digest(model_folder: Callable[[str], Path], tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_bytes((model_folder("llama") / "config.json").read_bytes())
    for spoil, reason in (
        (tmp_path / "other", "model.safetensors is missing"),
        (tmp_path / "model.safetensors.sealed", "is sealed: its digest is that of the opened model"),
        (tmp_path / "model.safetensors", "is it truncated?"),
    ):
        spoil.write_bytes(b"")
        assert main(["attest", "model", "--model", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("cleave attest model: ")
        assert reason in error
    assert main(["attest", "model", "--model", str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
