"""The development PKI: the certificate table, byte by byte; the verifier's own tests judge the rest."""

import pytest

from deploy.local.simulated_pki import DevPki, certificate_table


@pytest.fixture(scope="module")
def pki() -> DevPki:
    return DevPki()


def test_the_table_is_that_of_the_ghcb_specification() -> None:
    table = certificate_table([b"vcek!", b"ask", b"ark."])
    assert table[:16].hex() == "63da758de6644564adc5f4b93be8accd"  # the order of the text, as hosts write it
    assert table[24:40].hex() == "4ab7b379bbac4fe4a02f05aef327c782"
    assert table[48:64].hex() == "c0b406a4a803495297433fb6014cd0ae"
    assert [int.from_bytes(table[at : at + 4], "little") for at in (16, 20, 40, 44, 64, 68)] == [96, 5, 101, 3, 104, 4]
    assert table[72:96] == bytes(24)
    assert table[96:] == b"vcek!askark."


@pytest.mark.parametrize(("data", "measurement"), [(63, 48), (65, 48), (0, 48), (64, 47), (64, 49)])
def test_other_sizes_are_refused(pki: DevPki, data: int, measurement: int) -> None:
    with pytest.raises(ValueError, match="another size"):
        pki.report(bytes(data), bytes(measurement))


def test_a_report_carries_what_it_was_given(pki: DevPki) -> None:
    report = pki.report(bytes(range(64)), b"m" * 48)
    assert len(report) == 1184
    assert report[0x10:0x20] == b"SIMULATED-NO-TEE"
    assert report[0x50:0x90] == bytes(range(64))
    assert report[0x90:0xC0] == b"m" * 48
    assert len(pki.root) == 64
