"""The repeated-token probe: keys of one token over and over turn, each dim at a frequency of its own.

Source: published analyses of permuted caches under RoPE. Needs: a chosen prompt of one token, the public rule of
rotation; no weights. Reads: the rotated keys of layer 0, from the cache if it is to be had; no permutation of their
dims hides anything. Where keys are only seen before their rotation, the attacker rotates them himself.

1. Position 0 is not rotated, and in layer 0 all other positions rotate the same key: rope_crossing's step 2.
2. A dim is labelled when the key of position 0, rotated by the labels, gives it at every other position.

Chance is a bound that holds for any values of which each position's sign is a fair coin's, whatever their sizes (masked
words are uniform): a curve of one frequency has at most 2t patterns of signs, and values with another sign than the
curve's are lost to it, so only the smallest ones may differ, those with a share of LOST of the energy.
"""

from math import comb

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Fact, Finding, Ints, Knowledge
from evaluation.attacks.parts import part, rotated_keys
from evaluation.attacks.rope_crossing import foretold, order
from evaluation.attacks.view import View
from wire.linears import Linear

F64 = npt.NDArray[np.float64]
LOST = 1e-8  # of a dim's energy, by rounding


def attack(view: View, known: Knowledge) -> list[Finding]:
    """Which dim of K is which."""
    k = rotated(view, known)
    if k is None:
        return []
    hits, chance = int((labels(k, known) >= 0).sum()), luck(k, len(known.model.config.inverse_frequencies()))
    return [Fact("dims of K, layer 0", "dims labelled", hits, k[0].size, chance, chance if hits else 1.0)]


def rotated(view: View, known: Knowledge) -> F64 | None:
    """Keys of the repeated token [t, K, d], rotated; None where there are none."""
    if known.repeated is None or known.model.config.rope is None:
        return None
    seen = rotated_keys(view, known, 0, [known.repeated])
    if seen is not None:
        return seen.astype(np.float64)
    k = part(view, known, "k", 0, [known.repeated])
    if k is None:
        return None
    width = known.model.weight(0, Linear.QKV).shape[0]
    bias = known.model.split(np.broadcast_to(known.model.bias(0, Linear.QKV), width))[1]  # is no secret and no word
    return known.model.rotate(k - bias, np.arange(len(k))).astype(np.float64)


def labels(k: F64, known: Knowledge) -> Ints:
    """The public number of each dim of K, [K, d]; -1 where it does not prove true."""
    start, rope = np.broadcast_to(k[0], k.shape), known.model.config.rope
    if rope is None:
        raise ValueError("there is no rotation")
    angles = np.arange(len(k), dtype=np.float64)[:, None] * known.model.config.inverse_frequencies()
    said = np.stack([order(start[:, head], k[:, head], angles, rope) for head in range(k.shape[1])])
    wrong = ((foretold(start, said, known) - k) ** 2).sum(axis=0)
    energy = (k**2).sum(axis=0)
    return np.where((wrong <= LOST * energy) & (energy > 0), said, -1)


def luck(k: F64, curves: int) -> float:
    """A bound of the probability that any dim of k [t, ...] follows any curve, given the sizes of its values."""
    tokens = len(k)
    energies = np.sort((k**2).reshape(tokens, -1), axis=0).cumsum(axis=0)
    differ = (energies <= LOST * energies[-1]).sum(axis=0)
    patterns = sum(comb(tokens, wrong) for most in differ for wrong in range(most + 1))
    return float(min(1.0, curves * 2 * tokens * patterns / (1 << tokens)))
