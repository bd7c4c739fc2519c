"""Output perturbation: released logits are the model's plus noise that is at most b, for every token of every answer.

What is promised. p is the model's distribution of the next token, softmax(logits); q is the released one,
softmax(logits + e), with |e| <= b for every token of the vocabulary. Then KL(p || q) <= b^2 / 2 nats, and KL(q || p)
too: in the worst case of noise, for every released token, not in the mean. The mean is about b^2 / 6 for small b.

Why. KL(p || q) = log E_p[exp(e)] - E_p[e]. Under p, e is a random variable in [-b, b], and Hoeffding's lemma bounds
log E_p[exp(e - E_p[e])] by (2 b)^2 / 8. For the other direction swap p and q: p is q with noise -e. Tokens and
log-probabilities are computed from released logits only. Temperature T divides the noise as well: b^2 / (2 T^2). Of
what top-k, top-p and a repetition penalty leave, nothing more is promised than that they were given released logits.

(1) Noise is a function of a key, b and the context's tokens: HMAC-SHA256(key, label || SHA-256(tokens)) is the key of
    an AES-256-CTR stream, of which each word is one token's noise, uniform on (-b, b). The same question asked again
    gets the same noise in every session under this key: averaging over repetitions gains nothing.
(2) What the worker insists on and what a session asks beyond it are two noises, with keys of their own. One stream at
    two sizes would cancel out of two answers; so the worker's part is the same one whatever a session asks.
(3) Rounding to float32 is towards the exact logit, so that |e| <= b holds after it, too.

What is seen: token ids and log-probabilities of q. What is learnt: p, up to b in each logit. What breaks it: a key
that serves two models, one of them known. Its noise is the other's, so a key belongs to one model and one adapter.

What it does not do. It bounds what one released distribution says of the model's, from both sides: answers stay good,
logits stay vague. It makes no model inextractable: other contexts have other noise, and a student that is trained on
many of them averages it out. A greedy token changes only where the two best logits are closer than 2 b.
"""

import hashlib
import hmac

import numpy as np
from Crypto.Cipher import AES

from trusted_worker.arithmetic import F32
from trusted_worker.config import MOST_PERTURBATION
from wire.errors import InvalidArgumentError

BLOCK = 1 << 11  # elements that numpy's temporaries hold
KEY_BYTES = 32


class Perturbation:
    """What one session's logits get. `asked` by its client; `least` is what the worker insists on; `key` is secret.

    Raises InvalidArgumentError for what is asked beyond 0 to MOST_PERTURBATION, ValueError where noise is due and the
    key is short.
    """

    def __init__(self, asked: float, least: float = 0.0, key: bytes = b"") -> None:
        if not 0 <= asked <= MOST_PERTURBATION:
            raise InvalidArgumentError(f"perturbation must be between 0 and {MOST_PERTURBATION:g}")
        if not 0 <= least <= MOST_PERTURBATION:
            raise ValueError(f"the least perturbation must be between 0 and {MOST_PERTURBATION:g}")
        self.bound = max(asked, least)
        if self.bound and len(key) < KEY_BYTES:
            raise ValueError(f"perturbation needs a key of {KEY_BYTES} bytes")
        parts = (b"least", least), (b"asked", self.bound - least)
        self._key, self._parts = key, [(label, size) for label, size in parts if size]

    def apply(self, logits: F32, context: list[int]) -> None:
        """In place: logits float32[vocabulary] become the released ones, given all tokens so far."""
        for label, size in self._parts:
            add_noise(logits, size, self._stream_key(label, size, context))

    def _stream_key(self, label: bytes, size: float, context: list[int]) -> bytes:
        """Step (1). Tokens are 32-bit words and the rest has fixed lengths, so no two contexts hash the same bytes."""
        tokens = hashlib.sha256()
        for start in range(0, len(context), BLOCK):
            tokens.update(np.array(context[start : start + BLOCK], "<u4").tobytes())
        named = b"cleave perturbation v1 " + label + np.array(size, "<f8").tobytes() + tokens.digest()
        return hmac.digest(self._key, named, "sha256")


def add_noise(logits: F32, size: float, key: bytes) -> None:
    """In place: noise uniform on (-size, size), float32[n]. No two calls with one key but for the same logits."""
    stream = AES.new(key, AES.MODE_CTR, nonce=bytes(8))  # the key is used for this context only
    for start in range(0, len(logits), BLOCK):
        exact = logits[start : start + BLOCK].copy()
        words = np.frombuffer(stream.encrypt(bytes(4 * len(exact))), "<u4")
        released = (exact + size * ((words + 0.5) / 2.0**31 - 1)).astype(np.float32)
        beyond = np.abs(released.astype(np.float64) - exact) > size
        released[beyond] = np.nextafter(released[beyond], exact[beyond])  # step (3)
        logits[start : start + BLOCK] = released
