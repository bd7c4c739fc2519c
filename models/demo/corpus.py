"""Read the demo model's text, compare questions, and vary them for training.

A text file holds exchanges separated by blank lines: several `? question` lines (paraphrases of one another),
then one `> answer` line. Lines that start with `#` are comments.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

FRAMES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (
        re.compile(r"^(?:what is|what's|what are) (.+)$", re.IGNORECASE),
        ("what is {0}", "what's {0}", "tell me what {0} is", "can you say what {0} is", "do you know what {0} is",
         "could you tell me {0}", "I want to know what {0} is", "{0}, what is it", "I would like to know {0}",
         "any idea what {0} is", "what would be {0}", "what exactly is {0}", "please tell me {0}", "so what is {0}"),
    ),
    (
        re.compile(r"^(?:explain|define|describe) (.+)$", re.IGNORECASE),
        ("explain {0}", "define {0}", "describe {0}", "can you explain {0}", "please explain {0}", "what is {0}",
         "give me a short explanation of {0}", "tell me about {0}", "I do not understand {0}",
         "help me understand {0}"),
    ),
    (
        re.compile(r"^(?:how do I|how can I|how to) (.+)$", re.IGNORECASE),
        ("how do I {0}", "how can I {0}", "how to {0}", "how should I {0}", "what is the way to {0}",
         "tell me how to {0}", "show me how to {0}", "I want to {0}", "can you explain how to {0}",
         "what must I do to {0}", "what do I do to {0}", "how would one {0}", "is there a way to {0}"),
    ),
    (
        re.compile(r"^(?:tell me|say|name|give me) (.+)$", re.IGNORECASE),
        ("tell me {0}", "can you tell me {0}", "please tell me {0}", "could you give me {0}", "give me {0}",
         "I want to hear {0}", "I would like {0}"),
    ),
    (
        re.compile(r"^((?:who|why|when|where|which|what|how|does|is|are|can|do|will) .+)$", re.IGNORECASE),
        ("{0}", "tell me, {0}", "just wondering, {0}", "I wonder, {0}", "one question: {0}", "quick question, {0}",
         "{0}, do you know", "{0}, in short", "I was asking myself: {0}"),
    ),
)  # fmt: skip
OPENERS = ("hi, ", "hello, ", "hey, ", "hey ", "please, ", "ok, ", "okay, ", "so ", "so, ", "well, ", "and ", "um, ",
           "now ", "thanks. ", "cool. ", "I see. ", "sorry, ", "listen, ", "good. ", "alright, ")  # fmt: skip
CLOSERS = (" please", ", please", " exactly", " in one sentence", " by the way", " again", ", thanks", " then")
SHORTER = (
    ("what is", "what's"), ("who is", "who's"), ("where is", "where's"), ("do not", "don't"), ("does not", "doesn't"),
    ("I am", "I'm"), ("you are", "you're"), ("is not", "isn't"), ("cannot", "can't"), ("how is", "how's"),
    ("that is", "that's"), ("can you", "could you"), ("could you", "can you"), ("you", "u"), ("because", "cause"),
)  # fmt: skip
SYNONYMS = (
    ("largest", "biggest"), ("explain", "describe"), ("leave", "exit", "quit"), ("start", "launch", "begin", "run"),
    ("show", "display", "print"), ("use", "need"), ("private", "secret", "confidential"), ("safe", "secure"),
    ("computer", "machine"), ("question", "message", "prompt"), ("answer", "reply", "response"), ("make", "prepare"),
    ("build", "create", "develop"), ("built", "created", "developed", "made"), ("fast", "quick"), ("hide", "conceal"),
    ("protect", "guard", "hide"), ("verify", "check"), ("verified", "checked"), ("store", "keep", "save"),
    ("purpose", "point", "reason"), ("city", "town"), ("tell", "say"), ("happens", "occurs"), ("job", "task", "role"),
    ("parts", "pieces", "components"), ("sees", "gets", "receives"), ("clear", "erase", "delete"), ("stop", "cancel"),
    ("work", "function"), ("difference", "distinction"), ("called", "named"), ("idea", "principle"), ("speak", "talk"),
    ("film", "movie"), ("wrong", "false", "incorrect"), ("small", "little", "tiny"), ("get", "receive"),
)  # fmt: skip
SMALL_WORDS = frozenset(("a", "an", "the", "is", "are", "of", "do", "does", "to", "in", "on", "it", "you", "me", "for"))


@dataclass(frozen=True)
class Exchange:
    """One answer, and the questions that it answers."""

    topic: str
    questions: tuple[str, ...]
    answer: str


def normalise(question: str) -> str:
    """Return the question in lower case without punctuation: two wordings are the same if this is the same."""
    return " ".join(re.findall(r"[a-z0-9+*/=-]+", question.lower().replace("'", "")))


def parse(text: str, topic: str) -> list[Exchange]:
    """Parse one text file; a block without questions, or without exactly one answer, is refused."""
    found: list[Exchange] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        questions = tuple(line[2:] for line in lines if line.startswith("? "))
        answers = [line[2:] for line in lines if line.startswith("> ")]
        if not questions or len(answers) != 1 or len(questions) + 1 != len(lines):
            raise ValueError(f"{topic}: not an exchange: {block!r}")
        found.append(Exchange(topic, questions, answers[0]))
    return found


def read_text(folder: Path = FOLDER / "text") -> list[Exchange]:
    """Read every exchange of the text, in the order of the file names."""
    return [one for path in sorted(folder.glob("*.txt")) for one in parse(path.read_text("ascii"), path.stem)]


def read_held_out(path: Path = FOLDER / "heldout.jsonl") -> list[tuple[str, str]]:
    """Read the held-out pairs (question, key phrase)."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text("ascii").splitlines() if line.strip()]
    return [(str(row["question"]), str(row["key_phrase"])) for row in rows]


def reframe(question: str, rng: random.Random) -> str:
    """Say the question in another frame of the same meaning, where one of the known frames fits."""
    bare = question.rstrip("?.! ")
    for pattern, frames in FRAMES:
        match = pattern.match(bare)
        if match:
            return rng.choice(frames).format(match.group(1))
    return question


def swap_synonym(question: str, rng: random.Random) -> str:
    """Exchange one word for another of about the same meaning, where one is known."""
    words = question.split(" ")
    known = [(index, group) for index, word in enumerate(words) for group in SYNONYMS if word.lower() in group]
    if known:
        index, group = rng.choice(known)
        words[index] = rng.choice(group)
    return " ".join(words)


def misspell(question: str, rng: random.Random) -> str:
    """Make one slip of the keyboard inside a word of at least five letters, as people do."""
    words = question.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long:
        return question
    at = rng.choice(long)
    word = words[at]
    i = rng.randrange(1, len(word) - 1)
    slips = (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    words[at] = rng.choice(slips)
    return " ".join(words)


def drop_small_word(question: str, rng: random.Random) -> str:
    """Leave out one word that carries little meaning."""
    words = question.split(" ")
    small = [index for index, word in enumerate(words) if word.lower() in SMALL_WORDS]
    if len(words) < 4 or not small:
        return question
    del words[rng.choice(small)]
    return " ".join(words)


def contract(question: str, rng: random.Random) -> str:
    """Exchange one pair of words for the shorter form of it."""
    long, short = rng.choice(SHORTER)
    return re.sub(rf"\b{long}\b", short, question, count=1, flags=re.IGNORECASE)


def vary(question: str, rng: random.Random) -> str:
    """Return a light variation of the question: another frame, another word, an opener, a slip."""
    if rng.random() < 0.3:
        question = reframe(question, rng)
    if rng.random() < 0.25:
        question = contract(question, rng)
    if rng.random() < 0.2:
        question = swap_synonym(question, rng)
    if rng.random() < 0.12:
        question = drop_small_word(question, rng)
    if rng.random() < 0.08:
        question = misspell(question, rng)
    if rng.random() < 0.12:
        question = rng.choice(OPENERS) + question
    if rng.random() < 0.06:
        question = question.rstrip("?.! ") + rng.choice(CLOSERS)
    return question
