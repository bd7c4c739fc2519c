"""Metadata: how long prompts and answers are, and what kind of conversation that makes it. Leaks by design.

Source: Whisper Leak (arXiv 2511.03675) and other traffic analysis. Needs: nothing. Reads: how many rows each call has,
and when it came; never a tensor. No scheme that computes row by row hides this without padding in rows and in time.

(1) Every pass ends with the product with the head, or with the step that asks for logits. Rows before it are its own.
(2) A pass of many rows begins a conversation, passes of one row go on with it: one for each token of its answer after
    the first.
(3) Of the lengths, and the time that the answer took, the nearest mean of the labelled kinds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.view import View
from evaluation.transcript import Exchange, Transcript
from wire.linears import Linear


@dataclass(frozen=True)
class Conversation:
    """What can be counted of one."""

    prompt: int  # tokens
    answer: int
    seconds: float  # from the end of its first pass to the end of its last


def attack(view: View, known: Knowledge) -> list[Finding]:
    """Lengths of all conversations, and the kinds of those that are not labelled."""
    found = conversations(view.transcript)
    if len(found) != len(known.lengths):
        return []
    longest = max(known.lengths)
    lengths = np.array([[one.prompt, one.answer] for one in found])
    return [
        Answers("rows of each prompt", "prompt lengths", lengths[:, 0], longest),
        Answers("passes of each answer", "answer lengths", lengths[:, 1], longest),
        Answers("lengths and times", "kinds", _kinds(found, known), 2),
    ]


def conversations(transcript: Transcript) -> list[Conversation]:
    """Steps (1) and (2)."""
    found: list[Conversation] = []
    rows, begun = 0, 0
    for exchange in transcript.exchanges:
        rows += _rows(exchange)
        if not _ends(exchange):
            continue
        if rows > 1:
            begun = exchange.us
            found.append(Conversation(rows, 1, 0.0))
        elif found and rows:
            found[-1] = Conversation(found[-1].prompt, found[-1].answer + 1, (exchange.us - begun) / 1e6)
        rows = 0
    return found


def _kinds(found: list[Conversation], known: Knowledge) -> npt.NDArray[np.int64]:
    """Step (3)."""
    measured = np.array([[one.prompt, one.answer, one.seconds] for one in found])
    labelled = measured[list(known.metered)]
    scale = labelled.std(axis=0) + 1e-9
    kinds = np.array(list(known.metered.values()))
    means = np.stack([labelled[kinds == kind].mean(axis=0) for kind in (0, 1)])
    far = (measured[list(known.unmetered), None] - means) / scale
    said: npt.NDArray[np.int64] = (far**2).sum(axis=-1).argmin(axis=1)
    return said


def _rows(exchange: Exchange) -> int:
    """Rows of a pass, counted once: where it enters the model."""
    operation = exchange.operation
    match operation.WhichOneof("kind"):
        case "ring_matmul" | "matmul" as kind:
            product = getattr(operation, kind)
            return len(exchange.up) if (product.layer, product.linear) == (0, Linear.QKV) else 0
        case "forward":
            return sum(one.rows for one in operation.forward.sequences)
        case "chain":
            return sum(one.rows for one in operation.chain.steps[0].embed.sequences)
        case _:
            return 0


def _ends(exchange: Exchange) -> bool:
    """Whether logits leave: the last rows of a prompt, or of one token."""
    operation = exchange.operation
    match operation.WhichOneof("kind"):
        case "ring_matmul" | "matmul" as kind:
            return bool(getattr(operation, kind).linear == Linear.LM_HEAD)
        case "forward":
            return bool(operation.forward.logit_rows)
        case "chain":
            last = operation.chain.steps[-1]
            return last.HasField("head") and bool(last.head.logit_rows)
        case _:
            return False
