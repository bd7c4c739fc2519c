"""From logits to one token: repetition penalty, temperature, top-k, top-p, in the order of transformers.

Log-probabilities are those of the model, before any of these.
"""

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trusted_worker.arithmetic import F32
from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

MAX_LOGPROBS = 100


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Sampling state of one session. Raises InvalidArgumentError for parameters out of range."""

    def __init__(self, settings: pb.Sampling) -> None:
        _check(settings)
        self._settings = settings
        self._random = np.random.default_rng(settings.seed if settings.seeded else secrets.randbits(128))

    def choose(self, logits: F32, context: list[int]) -> Choice:
        """One token for logits float32[vocabulary], given all tokens so far."""
        if not np.isfinite(logits).all():
            raise InvalidArgumentError("the model's logits are not finite")
        scores = logits.astype(np.float64)
        logprobs = _log_softmax(scores)
        penalty = self._settings.repetition_penalty
        if penalty not in (0.0, 1.0):
            seen = np.unique(context)
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        token = int(scores.argmax()) if not self._settings.temperature else self._draw(scores)
        top = np.argsort(-logprobs, kind="stable")[: self._settings.logprobs] if self._settings.logprobs else ()
        return Choice(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))

    def _draw(self, scores: npt.NDArray[np.float64]) -> int:
        order = np.argsort(-scores, kind="stable")
        if self._settings.top_k:
            order = order[: self._settings.top_k]
        probabilities = np.exp(_log_softmax(scores[order] / self._settings.temperature))
        if 0 < self._settings.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            keep = before < self._settings.top_p
            order, probabilities = order[keep], probabilities[keep]
        return int(self._random.choice(order, p=probabilities / probabilities.sum()))


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = scores - scores.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _check(settings: pb.Sampling) -> None:
    if not 0 <= settings.temperature <= 100:
        raise InvalidArgumentError("temperature must be between 0 and 100")
    if not 0 <= settings.top_p <= 1:
        raise InvalidArgumentError("top_p must be between 0 and 1")
    if not 0 <= settings.repetition_penalty <= 100:
        raise InvalidArgumentError("repetition_penalty must be between 0 and 100")
    if settings.logprobs > MAX_LOGPROBS:
        raise InvalidArgumentError(f"at most {MAX_LOGPROBS} logprobs can be asked for")
