"""Rates and percentiles of the last minutes (base.recent)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar.base.recent import BOUNDS, WINDOW_S, Quantiles, Sample, Timeline

SHARES = (0.0, 0.5, 0.95, 0.99, 1.0)


@given(st.lists(st.floats(1.01e-4, 100.0), min_size=1, max_size=200))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(times: list[float]) -> None:
    recent = Quantiles()
    for seconds in times:
        recent.observe(seconds, 1000.0)
    found = recent.at(SHARES, 1001.0)
    ordered = sorted(times)
    ratio = BOUNDS[1] / BOUNDS[0] * (1 + 1e-9)
    for share, value in zip(SHARES[1:], found[1:], strict=True):
        exact = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        assert value is not None and exact / ratio <= value <= exact * ratio
    assert all(a <= b for a, b in pairwise(found))  # type: ignore[operator]


def test_what_is_older_than_the_window_is_forgotten() -> None:
    recent = Quantiles()
    recent.observe(5.0, 1000.0)
    recent.observe(0.01, 1000.0 + WINDOW_S)
    (both,) = recent.at([1.0], 1000.0 + WINDOW_S)
    (late,) = recent.at([1.0], 1000.0 + WINDOW_S + 20)
    assert both == pytest.approx(5.0, rel=0.13) and late == pytest.approx(0.01, rel=0.13)
    assert recent.at([0.5], 1e6) == [None]


def test_memory_is_bounded() -> None:
    recent = Quantiles()
    for second in range(3600):
        recent.observe(1e9, float(second))  # beyond the last bound
    assert len(recent._slices) <= 22
    assert recent.at([0.5], 3600.0) == [BOUNDS[-1]]


class Counts:
    """What a timeline takes its samples of."""

    def __init__(self) -> None:
        self.output = 0
        self.running = 0
        self.timeline = Timeline(lambda at: Sample(at, 0, self.output, 0, 0, self.running, 0, 0.0))

    def step(self, began: float, ended: float, tokens: int) -> None:
        self.running = 1
        self.timeline.begin(began)
        self.output += tokens
        self.timeline.end(ended)
        self.running = 0


def test_rates_over_pauses_and_long_steps() -> None:
    counts = Counts()
    for i in range(25):  # 10 tokens a second for 2.5 s, then nothing for a minute
        counts.step(100 + i / 10, 100.1 + i / 10, 1)
    now = 160.0
    assert counts.timeline.growth(5.0, now).output_tokens == 0
    assert counts.timeline.growth(300.0, now).output_tokens == 25
    seconds = counts.timeline.seconds(62, now)
    assert [one.at for one in seconds] == [float(at) for at in range(99, 161)]
    assert [one.output_tokens for one in seconds][:6] == [0, 0, 10, 10, 5, 0]
    assert sum(one.output_tokens for one in seconds) == 25
    assert [one.running for one in seconds][2:6] == [1, 1, 0, 0]
    counts.step(160.0, 164.0, 40)  # one step of four seconds
    assert counts.timeline.growth(2.0, 164.0).output_tokens == 20


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 3), st.integers(0, 50)), max_size=60))
def test_no_token_is_lost_or_counted_twice(steps: list[tuple[float, float, int]]) -> None:
    counts, now = Counts(), 50.0
    for pause, length, tokens in steps:
        counts.step(now + pause, now + pause + length, tokens)
        now += pause + length
    shown = counts.timeline.growth(1e6, now).output_tokens
    assert shown == counts.output


def test_an_hour_is_forgotten_but_for_its_last_minutes() -> None:
    counts = Counts()
    for i in range(36000):
        counts.step(1000 + i / 10, 1000.1 + i / 10, 1)
    assert len(counts.timeline._samples) < 2 * WINDOW_S + 10
    assert counts.timeline.growth(WINDOW_S, 4600.0).output_tokens == pytest.approx(3000, abs=2)
