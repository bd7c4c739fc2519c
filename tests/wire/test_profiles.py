"""Memory profiles: their sizes and sources, and what goes with --memory-budget."""

import pytest

from wire.profiles import MIB, PROFILES, budget, holding

SIZES = {"optee": 14, "optee-rpi3": 16, "qsee": 24, "trustzone": 64, "sgx1": 93}


def test_sizes_have_sources() -> None:
    assert {name: one.bytes // MIB for name, one in PROFILES.items() if one.bytes} == SIZES
    assert list(PROFILES) == [*sorted(SIZES, key=lambda name: SIZES[name]), "cvm"]
    assert all("(" in one.source for one in PROFILES.values() if one.bytes)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [("", None, 7), ("", 9, 9), ("", 0, 0), ("optee", None, 14 * MIB), ("cvm", 1 << 40, 1 << 40)],
)
def test_one_of_the_two_decides(name: str, given: int | None, expected: int) -> None:
    assert budget(name, given, 7) == expected


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [("optee", 14 * MIB, "optee is 14 MiB: leave --memory-budget out"), ("cvm", None, "add --memory-budget")],
)
def test_what_does_not_go_together_says_why(name: str, given: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        budget(name, given, 7)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        budget("enclave", None, 7)


def test_which_profiles_hold_so_many_bytes() -> None:
    assert holding(0) == list(SIZES)
    assert holding(14 * MIB) == list(SIZES)
    assert holding(14 * MIB + 1) == ["optee-rpi3", "qsee", "trustzone", "sgx1"]
    assert holding(93 * MIB + 1) == []
