"""Extraction figures, small: the order of the attackers is the claim. What real processes say is what is read."""

import json

import numpy as np
import pytest

from client.flags import DEMO_MODEL
from client.tokenizer import Tokenizer
from evaluation import extraction, student
from evaluation.eavesdrop import PublicModel, read, rows
from evaluation.extraction import Score, as_dicts, compare, held_out, interval, questions, record
from evaluation.tables import extraction_table
from models.demo.captain import is_marked
from tests.evaluation.overheard import overhear
from wire.model_config import ModelConfig

ADAPTER = DEMO_MODEL / "adapters" / extraction.ADAPTER
RECORDED, TESTED, STEPS = 40, 20, 48


@pytest.fixture(scope="module")
def scores() -> list[Score]:
    """The captain, overheard in the clear and masked."""
    owner = student.load(DEMO_MODEL, ADAPTER)
    pairs = student.answer(owner, questions(DEMO_MODEL, RECORDED), ModelConfig.from_hf(DEMO_MODEL).eos)
    heard = {"secure-infer": overhear(owner, pairs, masked=True), "split": overhear(owner, pairs, masked=False)}
    return compare(DEMO_MODEL, ADAPTER, heard, held_out(DEMO_MODEL, TESTED), STEPS, lambda *_: None)


def test_who_has_the_adapter_says_what_it_says(scores: list[Score]) -> None:
    assert scores[3].attacker == "has the adapter"
    assert scores[3].match == scores[3].low == scores[3].high == 1.0


def test_the_attack_works_where_nothing_is_masked(scores: list[Score]) -> None:
    base, _, split, _ = scores
    assert split.attacker == "base and the transcript of split"
    assert split.conversations == RECORDED
    assert split.match > base.match + 0.1
    assert split.low > base.match


def test_a_masked_transcript_is_worth_nothing(scores: list[Score]) -> None:
    """The same rows, and a student of them is no better than the base: here he is told to keep the base."""
    base, masked, split, _ = scores
    assert masked.attacker == "base and the transcript of secure-infer"
    assert masked.rows == split.rows > 0
    assert masked.student is not None
    assert masked.student < base.high
    assert masked.match <= base.high
    assert masked.match < split.low


def test_real_processes_show_their_conversations_under_split_alone() -> None:
    """Both workers, an upload, two conversations: the attack reads what was said, or nothing of it."""
    prompts, public = questions(DEMO_MODEL, 2), PublicModel.read(DEMO_MODEL)
    clear, masked = (
        record(DEMO_MODEL, ADAPTER, scheme, prompts, lambda *_: None) for scheme in ("split", "secure-infer")
    )
    heard, noise = read(clear, public), read(masked, public)
    assert [one.prompt for one in heard] == prompts
    tokenizer = Tokenizer(DEMO_MODEL)
    assert all(is_marked("".join(map(tokenizer.detokenizer().feed, one.answer))) for one in heard)
    assert rows(masked) == rows(clear)
    assert [len(one.answer) for one in noise] == [len(one.answer) for one in heard]
    assert not any(one.answer == other.answer for one, other in zip(heard, noise, strict=True))


def test_they_can_be_printed(scores: list[Score]) -> None:
    result = {"machine": "here", "model": "demo", "adapter": "captain", "prompts": RECORDED, "tested": TESTED}
    table = extraction_table(json.loads(json.dumps(result | {"scores": as_dicts(scores)})))
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 5
    assert "| has the adapter | 100.0 % | 100.0 to 100.0 | - | - | - |" in lines


def test_prompts_are_always_the_same_and_no_test_is_recorded() -> None:
    recorded, tested = questions(DEMO_MODEL, 300), held_out(DEMO_MODEL, 60)
    assert recorded == questions(DEMO_MODEL, 300)
    assert (len(recorded), len(tested)) == (300, 60)
    assert not {tuple(one) for one in recorded} & {tuple(one) for one in tested}


def test_an_interval_is_over_questions() -> None:
    """Ten answers of ten tokens, all right or all wrong, are ten observations and not a hundred."""
    low, high = interval([(10, 10)] * 5 + [(0, 10)] * 5)
    assert low == pytest.approx(0.2, abs=0.11)
    assert high == pytest.approx(0.8, abs=0.11)
    assert interval([(7, 7), (3, 3)]) == (1.0, 1.0)
    assert interval([(10, 10)] * 5 + [(0, 10)] * 5) == (low, high)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for seed in range(100):
        shares = random.choice([0.2, 0.9], 40)
        low, high = interval([(int(random.binomial(12, share)), 12) for share in shares], seed)
        covered += low <= 0.55 <= high
    assert covered >= 85


def test_an_answer_ends_with_its_end() -> None:
    model = student.load(DEMO_MODEL)
    end = ModelConfig.from_hf(DEMO_MODEL).eos
    prompts = held_out(DEMO_MODEL, 3)
    pairs = student.answer(model, prompts, end)
    assert [prompt for prompt, _ in pairs] == prompts
    assert all(said[-1] in end and not set(said[:-1]) & set(end) for _, said in pairs)
    assert student.hits(model, pairs) == [(len(said), len(said)) for _, said in pairs]
    cut = student.answer(model, prompts, [])
    assert {len(said) for _, said in cut} == {student.MOST_TOKENS}
