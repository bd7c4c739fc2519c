import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.binding import LABEL, REPORT_DATA_BYTES, canonical, report_data

TEXT = st.text(alphabet=st.characters(max_codepoint=127), max_size=8)
PARTS = st.tuples(TEXT, st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8))


def test_the_formula() -> None:
    written_out = LABEL + b"\0\0\0\x03tdx" + b"\0\0\0\x05nonce" + b"\0\0\0\x03key" + hashlib.sha256(b"{}").digest()
    assert report_data("tdx", b"nonce", b"key", b"{}") == hashlib.sha512(written_out).digest()
    assert len(report_data("", b"", b"", b"")) == REPORT_DATA_BYTES


@given(PARTS, PARTS)
def test_other_parts_give_other_data(
    one: tuple[str, bytes, bytes, bytes], two: tuple[str, bytes, bytes, bytes]
) -> None:
    assert (report_data(*one) == report_data(*two)) == (one == two)


def test_claims_have_one_form() -> None:
    assert canonical({"b": ["ü", 1], "a": None}) == b'{"a":null,"b":["\\u00fc",1]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})
