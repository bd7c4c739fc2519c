"""TEMPORARY."""

import secrets

from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

NONCE_BYTES = 32


class Attestor:
    def __init__(self, settings, hpke_key, claims):
        self._key, self._claims = hpke_key, claims

    async def attest(self, request):
        if len(request.nonce) not in (0, NONCE_BYTES):
            raise InvalidArgumentError(f"the nonce must be {NONCE_BYTES} bytes")
        return pb.AttestResponse(
            provider="none",
            nonce=request.nonce or secrets.token_bytes(32),
            hpke_key=self._key(),
            claims=self._claims(),
        )
