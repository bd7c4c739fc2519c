"""The envelope without a seal: what goes in comes out, and anything else is malformed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.errors import InvalidArgumentError
from wire.sealing import NoSeal
from wire.v1 import trusted_worker_pb2 as pb

CASES = settings(deadline=None, max_examples=100, derandomize=True)


@given(st.binary(max_size=20), st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(0, 2**32 - 1))
@CASES
def test_messages_come_out_as_they_went_in(session: bytes, ids: list[int], credit: int) -> None:
    message = pb.DecodeRequest(session=session, token_ids=ids, credit=credit, end_turn=bool(credit % 2))
    wire = pb.Sealed.FromString(NoSeal().wrap(message).SerializeToString())
    assert NoSeal().open(wire, pb.DecodeRequest) == message


@given(st.binary(max_size=60))
@CASES
def test_any_bytes_are_a_message_or_malformed(body: bytes) -> None:
    try:
        opened = NoSeal().open(pb.Sealed(body=body), pb.OpenRequest)
    except InvalidArgumentError as error:
        opened = None
        text = str(error)
        assert text == "malformed message"
    assert opened is None or isinstance(opened, pb.OpenRequest)


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b"\x08", b"\x0a\x02\xff\xfe"])
def test_malformed_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="malformed") as caught:
        NoSeal().open(pb.Sealed(body=body), pb.OpenRequest)
    assert str(caught.value) == "malformed message"


def test_an_empty_body_is_the_empty_message() -> None:
    assert NoSeal().open(pb.Sealed(), pb.CloseResponse) == pb.CloseResponse()
