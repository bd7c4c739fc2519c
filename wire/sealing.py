"""The envelope between client and trusted worker. Every message but Attest and Stats passes through a Seal.

The attested channel will be another implementation of the same protocol; nothing else has to change for it.
Until then evidence says "none", and so does the status line of the client.
"""

from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

M = TypeVar("M", bound=Message)


class Seal(Protocol):
    """Wraps and opens messages of one direction each. `open` raises a CleaveError for what it cannot vouch for."""

    def wrap(self, message: Message) -> pb.Sealed:
        """The message in its envelope."""
        ...

    def open(self, sealed: pb.Sealed, kind: type[M]) -> M:
        """The message inside."""
        ...


class NoSeal:
    """Provider "none": no confidentiality, no authenticity. For loopback and Unix sockets."""

    def wrap(self, message: Message) -> pb.Sealed:
        """The message in the clear."""
        return pb.Sealed(body=message.SerializeToString())

    def open(self, sealed: pb.Sealed, kind: type[M]) -> M:
        """Parse the body. Raises InvalidArgumentError when it is no such message."""
        try:
            return kind.FromString(sealed.body)
        except DecodeError as error:
            raise InvalidArgumentError("malformed message") from error
