from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.streaming import Detokenizer, StopFilter
from client.tokenizer import Tokenizer


def decode_bytes(ids: list[int]) -> str:
    """Token = byte; 256 is special and decodes to nothing."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def decode_fallback(ids: list[int]) -> str:
    """Like a byte-fallback decoder: one bad byte spoils the whole run of bytes."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    for decode in (decode_bytes, decode_fallback):
        detokenizer = Detokenizer(decode)
        pieces = [detokenizer.feed(byte) for byte in text.encode()]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_cut_off_at_the_end_is_not_shown() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.feed(byte) for byte in "a€".encode()[:-1]] == ["a", "", ""]
    assert detokenizer.flush() == ""


def test_special_tokens_are_skipped(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.chat([{"role": "user", "content": "héllo"}])
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.feed(token_id) for token_id in ids) == "héllo"


def cut(text: str, stops: list[str]) -> str:
    """Up to the stop string that ends first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("chop", [list, lambda s: [s], lambda s: [s[i : i + 2] for i in range(0, len(s), 2)]])
def test_stop_strings_across_token_boundaries(chop: Callable[[str], list[str]]) -> None:
    stops = ["\n\n", "STOP", "TOPP"]
    for text in ("abSTOPcd", "abSTO", "ab\nc\n\nd", "SSTOPP", "abSTTOPP", "STOP", ""):
        stop_filter = StopFilter(stops)
        out = "".join(stop_filter.feed(piece) for piece in chop(text)) + stop_filter.flush()
        assert out == cut(text, stops)
        assert stop_filter.stopped == (out != text)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    shown = ""
    for letter in text:
        shown += stop_filter.feed(letter)
        assert cut(text, stops).startswith(shown)
    assert shown + stop_filter.flush() == cut(text, stops)
