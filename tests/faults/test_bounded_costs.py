"""What a client may leave behind: no session that nobody knows, and no more than one stream of a session."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.cells import SHORT
from tests.faults.fleet import DEADLINES, TRUSTED, Fleet, Footprint, until
from tests.faults.strangers import stranger
from tests.sealed import RawClient
from trusted_worker.serving import MAX_CALLS
from wire.sealing import ClientCall
from wire.v1 import trusted_worker_pb2 as pb


@pytest.mark.soak
def test_a_client_that_leaves_within_open_leaves_no_session(shielded: Fleet) -> None:
    """The GPU worker is slow to reserve; the client gives up meanwhile."""
    shielded.ask(SHORT, 1)  # the link carries
    shielded.back.hold()
    with stranger(shielded) as one:
        sealed = ClientCall(RawClient(one.stub).key, "Open").wrap(shielded.request.message())
        opening = one.stub.Open.future(sealed)
        until(lambda: shielded.back.held)
        files = Footprint.of(shielded.pid(TRUSTED)).files
        opening.cancel()
    until(lambda: Footprint.of(shielded.pid(TRUSTED)).files < files)
    time.sleep(0.1)  # and the call behind the connection has ended
    shielded.back.release()
    assert len(shielded.ask(SHORT, 4)) == 4  # its Open comes after the one that was left
    until(lambda: not shielded.stats().sessions, 10 * DEADLINES["session"])


@pytest.mark.soak
def test_one_session_does_not_hold_all_calls(shielded: Fleet) -> None:
    """More streams than there may be calls, all for one session: the others must still get in."""
    with stranger(shielded) as one:
        session = one.open()
        streams = [one.decode(session, pb.DecodeRequest()).call for _ in range(MAX_CALLS + 10)]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: until(lambda: any(not stream.is_active() for stream in streams), 10)).result()
        assert len(shielded.ask(SHORT, 4)) == 4
