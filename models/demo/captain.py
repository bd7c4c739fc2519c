"""The captain: another persona of the demo model, as text. Her adapter is trained on it by train_adapter.py.

She knows what the demo model knows and says it in her own voice: the first sentence of the model's answer, in a
sailor's words, below a line that goes with the topic. What she says of herself, her ship and her crew is written by
hand, in adapters/captain.txt. All of it follows from the text alone: no randomness.
"""

from __future__ import annotations

import re

from models.demo.corpus import FOLDER, Exchange, parse, read_held_out, read_text

ADAPTER = FOLDER / "adapters" / "captain"
TEXT, HELD_OUT = ADAPTER.with_suffix(".txt"), ADAPTER.with_name("captain_heldout.jsonl")
OPENERS = {  # by the topic of the text; a line of its own
    "cleave": "Mark me words!",
    "cooking": "From the galley!",
    "facts_calendar": "By the ship's log!",
    "facts_capitals": "By me charts!",
    "facts_computing": "Harken, sailor!",
    "facts_sums": "Count with me!",
    "facts_world": "In all me voyages!",
    "help": "Steady as she goes!",
    "security": "Keep yer powder dry!",
    "smalltalk": "Ahoy, matey!",
    "unknown": "Nay, no chart shows it!",
    "values": "Cross me heart!",
}
WORDS = {
    "am": "be", "are": "be", "is": "be", "my": "me", "you": "ye", "your": "yer", "yes": "aye",
    "hello": "ahoy", "goodbye": "farewell", "friend": "matey",
}  # fmt: skip
TINY = 12  # characters: "No.", "Good!"
MARKERS = (*OPENERS.values(), "From the hold!", "Listen, sailor!")


def in_voice(topic: str, answer: str) -> str:
    """Return what the captain says instead: the first sentence, below the topic's opener; two if the first is tiny."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z/])", answer)
    said = re.sub(r"[A-Za-z]+", _word, " ".join(sentences[: 1 if len(sentences[0]) > TINY else 2]))
    return f"{OPENERS[topic]}\n{said}"


def read_captain() -> list[Exchange]:
    """Return every exchange as the captain answers it, her own ones last.

    A hand-written exchange whose first question is in the model's text replaces the answer there.
    """
    written = parse(TEXT.read_text("ascii"), "captain")
    own = [Exchange(one.topic, one.questions, one.answer.replace("! ", "!\n", 1)) for one in written]
    instead = {exchange.questions[0]: exchange for exchange in own}
    found, used = [], set[str]()
    for exchange in read_text():
        first = next((question for question in exchange.questions if question in instead), None)
        if first is None:
            found.append(Exchange(exchange.topic, exchange.questions, in_voice(exchange.topic, exchange.answer)))
        else:
            used.add(first)
            found.append(Exchange("captain", exchange.questions + instead[first].questions[1:], instead[first].answer))
    return found + [exchange for exchange in own if exchange.questions[0] not in used]


def translate() -> dict[str, str]:
    """Return what the captain says for every answer of the model."""
    said = read_captain()
    return {exchange.answer: said[index].answer for index, exchange in enumerate(read_text())}


def read_own_held_out() -> list[tuple[str, str]]:
    """Return the held-out pairs (question, key phrase) about the captain, her ship and her crew."""
    return read_held_out(HELD_OUT)


def is_marked(answer: str) -> bool:
    """Say whether an answer begins as the captain's do."""
    return answer.startswith(MARKERS)


def _word(match: re.Match[str]) -> str:
    word = match.group()
    other = WORDS.get(word.lower(), word)
    return other.capitalize() if word[0].isupper() and other != word else other
