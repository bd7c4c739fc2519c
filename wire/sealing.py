"""The confidential channel between client and trusted worker: HPKE (RFC 9180) frames in both directions.

What the network sees: who calls, which method, the session's public name, when, and frames of four sizes. What it
learns: nothing of their content. What breaks it: a client that does not verify the evidence which binds the HPKE key
(anybody can then offer a key of his own), the private key outside the trusted worker, a random generator that repeats.

Suite: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM. Every call is one HPKE exchange:
 1. Client:  enc, context = Setup(public key, INFO). For a call on a session Setup is that of mode_psk, with the name
             of the session as psk_id and its secret as psk: nobody else can make a first frame that opens.
 2. Frames to the worker are context.Seal(message, AD), in order: a frame that was changed, repeated, reordered, or that
             follows a dropped one does not open. AD = direction || lp(method) || lp(session) || u64 sequence.
 3. Worker:  refuses an `enc` that it has seen. It keeps at most MAX_SEEN; then it draws a new key, which evidence must
             bind anew: nothing that was sealed for the old one opens any more.
 4. Frames to the client are AES-256-GCM under a key of this call alone,
             HKDF(context.Export || 32 fresh bytes of the worker), nonce = sequence. So no nonce comes twice under a
             key, whatever a client repeats.
 5. Session: secret = context.Export of the exchange that opened it, which both sides know and nobody sent.
 6. Padding: a message is filled up with zeros so that the serialised frame has one of SIZES.
The end of an answer is a message too (Final). A stream that ends without it was cut, whatever its status says.
"""

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_public_key
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from google.protobuf.message import DecodeError, Message

from wire.binding import lp
from wire.channel import MAX_MESSAGE_BYTES
from wire.errors import InvalidArgumentError, SealError, UnauthenticatedError
from wire.v1 import trusted_worker_pb2 as pb

INFO = b"cleave channel v1"
SIZES = (512, 4096, 1 << 16, MAX_MESSAGE_BYTES)  # of serialised frames
MAX_SEEN = 1 << 14  # exchanges under one key
KEY_BYTES = NONCE_BYTES = 32
TAG_BYTES, LENGTH_BYTES = 16, 4

M = TypeVar("M", bound=Message)


class ClientCall:
    """The client's half of one call. One thread may wrap while another one opens."""

    def __init__(self, hpke_key: bytes, method: str, session: bytes = b"", secret: bytes = b"") -> None:
        """`hpke_key`: of a peer that was verified. Raises UnauthenticatedError when it is no X25519 key."""
        try:
            key = import_x25519_public_key(hpke_key)
            psk = (session, secret) if session else None
            self._context = HPKE.new(receiver_key=key, aead_id=HPKE.AEAD.AES256_GCM, info=INFO, psk=psk)  # (1)
        except ValueError:
            raise UnauthenticatedError("the trusted worker's HPKE key is not one") from None
        self._name = lp(method.encode()) + lp(session)
        self._session = session
        self._sent = self._received = 0
        self._reply_key = b""

    def wrap(self, message: Message) -> pb.Sealed:
        """The next frame to the worker. Raises InvalidArgumentError when the message is too large for one."""
        frame = pb.Sealed() if self._sent else pb.Sealed(enc=self._context.enc, session=self._session)
        frame.body = self._context.seal(_pad(message, frame), b"c" + self._name + _u64(self._sent))  # (2)
        self._sent += 1
        return frame

    def open(self, sealed: pb.Sealed, kind: type[M]) -> M:
        """The message in the worker's next frame. Raises SealError."""
        if sealed.enc or sealed.session or (self._received and sealed.nonce):
            raise SealError
        if not self._received:
            self._reply_key = _reply_key(self._context, sealed.nonce)
        plain = _open(self._reply_key, self._received, sealed.body, b"s" + self._name + _u64(self._received))
        self._received += 1
        return _message(plain, kind)

    @property
    def secret(self) -> bytes:
        """What the worker knows by this exchange, and nobody else (5)."""
        return _secret(self._context)


class WorkerCall:
    """The worker's half of one call."""

    def __init__(self, context: Any, method: str, session: bytes) -> None:
        self._context = context
        self._name = lp(method.encode()) + lp(session)
        self._received = self._sent = 0
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._reply_key = _reply_key(context, self._nonce)

    def open(self, sealed: pb.Sealed, kind: type[M]) -> M:
        """The message in the client's next frame. Raises SealError, and InvalidArgumentError when it is malformed."""
        if sealed.nonce or (self._received and (sealed.enc or sealed.session)):
            raise SealError
        try:
            plain = self._context.unseal(sealed.body, b"c" + self._name + _u64(self._received))
        except ValueError:
            raise SealError from None
        self._received += 1
        return _message(plain, kind)

    def wrap(self, message: Message) -> pb.Sealed:
        """The next frame to the client."""
        frame = pb.Sealed() if self._sent else pb.Sealed(nonce=self._nonce)
        cipher = AES.new(self._reply_key, AES.MODE_GCM, nonce=self._sent.to_bytes(12, "big"))  # (4)
        cipher.update(b"s" + self._name + _u64(self._sent))
        frame.body = b"".join(cipher.encrypt_and_digest(_pad(message, frame)))
        self._sent += 1
        return frame

    @property
    def secret(self) -> bytes:
        """What the client knows by this exchange, and nobody else (5)."""
        return _secret(self._context)


class Receiver:
    """The worker's key of this boot, and the exchanges that it has seen. `public_key` is what evidence binds."""

    def __init__(self, most: int = MAX_SEEN) -> None:
        self._most = most
        self._renew()

    def accept(
        self, sealed: pb.Sealed, method: str, kind: type[M], secret_of: Callable[[bytes], bytes] | None = None
    ) -> tuple[WorkerCall, M]:
        """A call and its first message. `secret_of` a session, for methods that belong to one.

        Raises UnauthenticatedError when the frame was not sealed for this worker as it is now, or is not fresh.
        """
        enc, session, psk = sealed.enc, sealed.session, None
        if secret_of is not None:
            psk = (session, secret_of(session))
        elif session:
            raise InvalidArgumentError("this call belongs to no session")
        if enc in self._seen:  # (3)
            raise UnauthenticatedError("this call was made before: a sealed call cannot be repeated")
        try:
            context = HPKE.new(receiver_key=self._key, aead_id=HPKE.AEAD.AES256_GCM, enc=enc, info=INFO, psk=psk)
            call = WorkerCall(context, method, session)
            message = call.open(sealed, kind)
        except (ValueError, SealError):
            raise UnauthenticatedError(
                "this call is not sealed for this trusted worker as it is now: ask for its evidence again"
            ) from None
        self._seen.add(enc)
        if len(self._seen) >= self._most:
            self._renew()
        return call, message

    def _renew(self) -> None:
        self._key = ECC.generate(curve="curve25519")
        self.public_key: bytes = self._key.public_key().export_key(format="raw")
        self._seen: set[bytes] = set()


def _reply_key(context: Any, nonce: bytes) -> bytes:
    """Of the frames to the client (4). Raises SealError when there is no nonce."""
    if len(nonce) != NONCE_BYTES:
        raise SealError
    exported = context.export(b"cleave reply", KEY_BYTES)
    return HKDF(exported + nonce, KEY_BYTES, b"", SHA256, context=b"cleave reply v1")


def _secret(context: Any) -> bytes:
    exported: bytes = context.export(b"cleave session", KEY_BYTES)
    return exported


def _open(key: bytes, sequence: int, body: bytes, bound: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=sequence.to_bytes(12, "big")).update(bound)
    try:
        return cipher.decrypt_and_verify(body[:-TAG_BYTES], body[-TAG_BYTES:])
    except ValueError:
        raise SealError from None


def _pad(message: Message, frame: pb.Sealed) -> bytes:
    """The message, filled up for the smallest frame that holds it beside what `frame` has already (6)."""
    raw, around = message.SerializeToString(), frame.ByteSize() + TAG_BYTES + LENGTH_BYTES + 1
    for size in SIZES:
        room = size - around - (2 if size < 1 << 14 else 3)  # protobuf's length of body
        if len(raw) <= room:
            return len(raw).to_bytes(LENGTH_BYTES, "big") + raw.ljust(room, b"\0")
    raise InvalidArgumentError(f"a message of {len(raw)} bytes does not fit a frame")


def _message(padded: bytes, kind: type[M]) -> M:
    length = int.from_bytes(padded[:LENGTH_BYTES], "big")
    raw = padded[LENGTH_BYTES : LENGTH_BYTES + length]
    try:
        if len(raw) != length:
            raise DecodeError
        return kind.FromString(raw)
    except DecodeError:
        raise InvalidArgumentError("malformed message") from None


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "big")
