"""Stop texts: the same end however the text is cut into deltas."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from elinvar.engine.stops import StopMatcher

few = st.text(alphabet="abé", max_size=30)
stop_texts = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop text that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    said = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        said += text
        if stopped is not None:
            return said, stopped
    return said + matcher.finish(), None


@given(few, stop_texts, st.lists(st.integers(0, 30), max_size=6))
def test_matches_the_naive_search_in_the_whole_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert streamed(pieces, stops) == naive(text, stops)
    assert streamed(list(text), stops) == naive(text, stops)


@given(few, stop_texts)
def test_holds_back_only_what_may_become_a_stop_text(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    said = ""
    for char in text:
        piece, stopped = matcher.push(char)
        said += piece
        if stopped:
            return
    rest = matcher.finish()
    assert said + rest == text
    assert not rest or any(stop.startswith(rest) for stop in stops)


def test_a_partial_match_comes_out_when_it_fails() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a##") == ("a", None)
    assert matcher.push("b#") == ("##b", None)
    assert matcher.push("##") == ("", "###")


def test_overlapping_begin() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aaa") == ("a", None)
    assert matcher.push("b") == ("", "aab")
