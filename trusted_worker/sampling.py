"""From logits to one token: repetition penalty, temperature, top-k, top-p, in the order of transformers.

Log-probabilities are those of the model, before any of these. All of it is computed from the released logits: those of
the model, with the noise of perturbation.py where a session or the worker wants it.

Nothing here is as long as the vocabulary but one array in the caller's scratch: scores in float64, which become 64-bit
keys where they stand. A key orders like its score, highest first, and its low bits are the token, so that sorting keys
in place ranks the tokens, equal ones by number, and the score can be read back from the key. It loses as many bits of
its 52 as a token has; those of logits, which come from float32, are zero anyway.
"""

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32, F64
from trusted_worker.perturbation import Perturbation
from trusted_worker.secure_memory import Scratch
from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

MAX_LOGPROBS = 100
BLOCK = 1 << 11  # elements that numpy's temporaries hold

I64 = npt.NDArray[np.int64]
_MAGNITUDE = np.int64((1 << 63) - 1)  # all bits of a float64 but its sign


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Sampling state of one session. Raises InvalidArgumentError for parameters out of range.

    `key`: of the noise, secret, 32 bytes; one for each model and adapter. `least`: perturbation whatever is asked.
    """

    def __init__(self, settings: pb.Sampling, key: bytes = b"", least: float = 0.0) -> None:
        _check(settings)
        self._settings = settings
        self._perturbation = Perturbation(settings.perturbation, least, key)
        self._random = np.random.default_rng(settings.seed if settings.seeded else secrets.randbits(128))

    @property
    def perturbation(self) -> float:
        """The most that a released logit is off."""
        return self._perturbation.bound

    def choose(self, logits: F32, context: list[int], scratch: Scratch) -> Choice:
        """One token for logits float32[vocabulary], given all tokens so far. See wire.scratch.sampling_bytes.

        With a perturbation `logits` are the released ones afterwards.
        """
        if not np.isfinite(logits.max()) or not np.isfinite(logits.min()):
            raise InvalidArgumentError("the model's logits are not finite")
        self._perturbation.apply(logits, context)
        with scratch.frame():
            scores: F64 = scratch.empty(logits.shape, np.float64)
            token = self._token(logits, context, scores)
            top = self._top(logits, scores)
        best, mass = float(logits.max()), _mass(logits)
        logprobs = [(one, float(logits[one]) - best - math.log(mass)) for one in (token, *top)]
        return Choice(token, logprobs[0][1], tuple(logprobs[1:]))

    def _token(self, logits: F32, context: list[int], scores: F64) -> int:
        np.copyto(scores, logits)
        penalty = self._settings.repetition_penalty
        if penalty not in (0.0, 1.0):
            for start in range(0, len(context), BLOCK):  # from the logits: a token that comes again changes nothing
                seen = np.array(context[start : start + BLOCK])
                before = logits[seen].astype(np.float64)
                scores[seen] = np.where(before > 0, before / penalty, before * penalty)
        if not self._settings.temperature:
            return int(scores.argmax())
        kept = rank(scores, self._settings.top_k)
        return kept.draw(self._settings.temperature, self._settings.top_p, self._random.random())

    def _top(self, logits: F32, scores: F64) -> list[int]:
        count = self._settings.logprobs
        if not count:
            return []
        np.copyto(scores, logits)
        return [int(token) for token in rank(scores, count).tokens(0, count)]


@dataclass(frozen=True)
class Ranking:
    """Keys of the best tokens, best first."""

    keys: I64
    mask: np.int64  # the bits that are the token

    def tokens(self, start: int, stop: int) -> I64:
        """The tokens of these ranks."""
        result: I64 = self.keys[start:stop] & self.mask
        return result

    def scores(self, start: int, stop: int) -> F64:
        """Their scores."""
        flipped = ~self.keys[start:stop]
        return ((flipped ^ (flipped >> 63 & _MAGNITUDE)) & ~self.mask).view(np.float64)

    def weights(self, temperature: float, start: int, stop: int) -> F64:
        """Their probabilities at this temperature, up to a factor that all share."""
        best = self.scores(0, 1) / temperature
        result: F64 = np.exp(self.scores(start, stop) / temperature - best)
        return result

    def draw(self, temperature: float, top_p: float, uniform: float) -> int:
        """The token at `uniform`, in [0, 1), of the summed probabilities of the first tokens that reach top_p."""
        starts = range(0, len(self.keys), BLOCK)
        sums = [float(self.weights(temperature, start, start + BLOCK).sum()) for start in starts]
        mass = sum(sums)
        if 0 < top_p < 1:
            _, mass = self.reach(temperature, sums, top_p * mass)
        place, _ = self.reach(temperature, sums, uniform * mass)
        return int(self.tokens(place, place + 1)[0])

    def reach(self, temperature: float, sums: list[float], target: float) -> tuple[int, float]:
        """The first rank at which the summed weights reach `target`, and their sum. `sums` are those of each block."""
        block, before = 0, 0.0
        while block < len(sums) - 1 and before + sums[block] < target:
            before += sums[block]
            block += 1
        within = before + np.cumsum(self.weights(temperature, block * BLOCK, (block + 1) * BLOCK))
        place = min(int(np.searchsorted(within, target)), len(within) - 1)
        return block * BLOCK + place, float(within[place])


def rank(scores: F64, count: int) -> Ranking:
    """The `count` best tokens, 0 for all, by their scores float64[vocabulary], which become keys."""
    keys, bits = scores.view(np.int64), (len(scores) - 1).bit_length()
    mask = np.int64((1 << bits) - 1)
    for start in range(0, len(keys), BLOCK):
        part = (scores[start : start + BLOCK] + 0.0).view(np.int64)  # -0 becomes 0
        ascending = part ^ (part >> 63 & _MAGNITUDE)
        keys[start : start + BLOCK] = ~ascending & ~mask | np.arange(start, start + len(part))
    if 0 < count < len(keys):
        keys.partition(count - 1)
        keys = keys[:count]
    keys.sort()
    return Ranking(keys, mask)


def _mass(logits: F32) -> float:
    """The sum of exp(logit - best)."""
    best = float(logits.max())
    blocks = (logits[start : start + BLOCK].astype(np.float64) for start in range(0, len(logits), BLOCK))
    return sum(float(np.exp(block - best).sum()) for block in blocks)


def _check(settings: pb.Sampling) -> None:
    if not 0 <= settings.temperature <= 100:
        raise InvalidArgumentError("temperature must be between 0 and 100")
    if not 0 <= settings.top_p <= 1:
        raise InvalidArgumentError("top_p must be between 0 and 1")
    if not 0 <= settings.repetition_penalty <= 100:
        raise InvalidArgumentError("repetition_penalty must be between 0 and 100")
    if settings.logprobs > MAX_LOGPROBS:
        raise InvalidArgumentError(f"at most {MAX_LOGPROBS} logprobs can be asked for")
