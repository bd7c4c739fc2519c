"""The loop: episodes of hostile entries into one target, until enough malformed frames are through."""

import time
from random import Random

from tests.fuzz.harness import CHECK_EVERY, EPISODE, SAMPLED, Bug, Result, Target, alarms, attempt, traced


def run(target: Target, frames: int, seed: str, go_on: bool = False, first_episode: int = 0) -> Result:
    """Fuzz. Stops at the first bug unless it is to go on; then one reproducer is kept for each signature."""
    result, episode, checked, start = Result(), first_episode, 0, time.monotonic()
    with alarms():
        target.check()  # before anything else: what a valid call is answered with
        while result.frames < frames:
            random, entries = Random(f"{seed}/{target.name}/{episode}"), list[bytes]()
            try:
                _episode(target, random, entries, result)
                if result.frames - checked >= CHECK_EVERY:
                    checked = result.frames
                    target.check()
            except Bug as bug:
                result.outcomes["BUG"] += 1
                result.bugs.setdefault(bug.signature, entries)
                if not go_on:
                    break
            episode += 1
    result.seconds = time.monotonic() - start
    return result


def _episode(target: Target, random: Random, entries: list[bytes], result: Result) -> None:
    target.begin()
    for _ in range(EPISODE):
        entry, malformed = target.next(random)
        entries.append(entry)
        sample = malformed and random.random() < SAMPLED
        outcome = traced(target, entry, result) if sample else attempt(target, entry)
        if malformed:
            result.frames += malformed
            result.outcomes[outcome[0]] += 1
            if outcome not in result.seeds:
                result.seeds[outcome] = [*entries]
    target.end()
