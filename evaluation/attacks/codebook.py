"""Codebook: an attacker who has had prompts of his own go through the same deployment knows them again.

Source: "permutation-confidentiality-experiments" (JiseungKim90): row spaces and Gram matrices of protected blocks give
100,000 enrolled prompts apart, whatever the permutation. Needs: known prompts, no weights. Reads: every place.
"""

from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.likeness import likeness
from evaluation.attacks.view import View


def attack(view: View, known: Knowledge) -> list[Finding]:
    """For each prompt said again the known one that is most alike, by each form."""
    numbers = list(known.known)
    found = likeness(view, known.again, numbers)
    return [Answers(form, "again", alike.argmax(axis=1), len(numbers)) for form, alike in found.items()]
