"""What drafts are worth, and what steps that verify them cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elinvar.ops.chances import Behind, Chances, best_counts
from elinvar.run.accounts import CREDIT, SAVED, Account
from elinvar.run.costs import FIRST, LOOK, OLD, SHORT, Curve, grid

booked = st.lists(st.tuples(st.integers(0, 40), st.floats(0.001, 1.0)), max_size=30)


@given(booked, st.integers(0, 60))
def test_a_curve_reaches_as_far_as_asked_and_never_falls(
    steps: list[tuple[int, float]], most: int
) -> None:
    curve = Curve()
    for drafts, seconds in [(0, 0.01), *steps]:
        curve.book(drafts, seconds)
    found = curve.upto(most)
    assert len(found) == most + 1
    assert found == sorted(found)
    assert found[0] == curve.plain


def test_between_measurements_it_is_a_line_and_behind_them_goes_on() -> None:
    curve = Curve()
    curve.book(0, 2.0)
    for _ in range(50):
        curve.book(4, 3.0)
        curve.book(8, 4.0)
    assert curve.upto(8)[::2] == [2.0, 2.5, 3.0, 3.5, 4.0]
    assert 4.9 < curve.upto(12)[12] < 5.1


def test_what_seemed_slow_once_is_tried_again() -> None:
    curve = Curve()
    curve.book(0, 1.0)
    curve.book(8, 30.0)
    assert curve.upto(8)[8] < 10, "it was the first time"
    for _ in range(FIRST):
        curve.book(8, 30.0)
    assert curve.upto(8)[8] == 30.0
    for _ in range(OLD + 1):
        curve.book(1, 1.1)
    assert curve.upto(8)[8] < 5


def test_what_seemed_dear_is_hoped_to_be_cheap_again() -> None:
    """Nobody measures what is not chosen."""
    curve = Curve()
    curve.book(0, 1.0)
    for _ in range(40):
        curve.book(4, 3.0)
    assert curve.upto(8)[8] > 4.5
    for _ in range(2 * OLD):
        curve.book(0, 1.0)
    assert curve.upto(8)[8] < 2


def test_drafts_are_held_against_steps_of_their_own_time() -> None:
    """The first step of a shape records it; longer texts, or a machine that is quicker, take another time."""
    curve = Curve()
    for seconds in (9.0, 1.0, 1.1)[:FIRST]:
        assert curve.is_due(500)
        curve.book(0, seconds, 500)
    assert not curve.is_due(500) and not curve.is_due(700)
    assert curve.is_due(800) and curve.is_due(300)
    curve.book(0, 2.0, 800)
    assert not curve.is_due(800) and curve.plain == 2.0
    curve.book(4, 1.5, 800)
    assert curve.is_due(800), "no step with drafts is quicker"
    curve.book(0, 1.0, 800)
    assert not curve.is_due(800)
    for _ in range(LOOK):
        curve.book(4, 1.5, 800)
    assert curve.is_due(800)
    # Of short texts the length says little.
    short = Curve()
    for _ in range(FIRST):
        short.book(0, 1.0, 3)
    assert not short.is_due(SHORT)


def test_what_slows_steps_without_drafts_slows_those_with_them() -> None:
    curve = Curve()
    for _ in range(FIRST):
        curve.book(0, 1.0)
        curve.book(4, 1.5)
    for _ in range(60):
        curve.book(0, 2.0)
    assert 2.95 < curve.upto(4)[4] < 3.05


def test_what_is_too_unlikely_to_pay_is_not_thought_of() -> None:
    """A draft that costs a tenth of a step of 8 rows pays from a chance of 0.8 on, one of a step of a
    row from 0.1."""
    curve = Curve()
    curve.book(0, 1.0)
    for _ in range(50):
        curve.book(2, 1.2)
    assert 0.024 < curve.least(1) < 0.026
    assert 0.19 < curve.least(8) < 0.21
    for _ in range(50):
        curve.book(1, 3.0)
    assert curve.least(8) == 0.5
    assert of(Chances(), behind(0), [1, 2, 3, 4], [0.9, 0.5, 0.5, 0.9], least=0.3) == [0.9, 0.45]


def test_shapes_are_recorded_at_their_first_use() -> None:
    curve = Curve()
    for seconds in (9.0, 2.0, 2.2)[:FIRST]:
        curve.book(0, seconds)
    assert curve.plain == 2.0


@given(st.integers(0, 500))
def test_numbers_that_are_measured_together_are_near(drafts: int) -> None:
    assert drafts <= grid(drafts) <= drafts + max(1, drafts // 4)
    assert grid(grid(drafts)) == grid(drafts)


def behind(row: int, token: int = 0, space: int = 0) -> Behind:
    return Behind(row, space, token)


def of(
    chances: Chances, place: Behind, tokens: list[int], said: list[float], least: float = 0.0
) -> list[float]:
    [found] = chances.of([place], [tokens], [said], least)
    return found


def learn(
    chances: Chances, place: Behind, tokens: list[int], said: list[float], came: list[int]
) -> None:
    chances.learn([place], [tokens], [said], [came])


def test_what_is_said_is_held_against_what_came() -> None:
    chances = Chances()
    for at in range(100, 200, 2):  # tokens that nobody has seen
        learn(chances, behind(0), [at, at], [0.9, 0.9], [at + 1])
        learn(chances, behind(1), [at], [0.2], [at, 7])
    assert of(chances, behind(2), [1], [0.9])[0] < 0.2
    assert of(chances, behind(2), [1], [0.2])[0] > 0.8
    # A row of its own kind is told apart soon.
    for at in range(300, 320, 2):
        learn(chances, behind(3), [at, at], [0.9, 0.9], [at, at, 7])
    assert of(chances, behind(3), [1], [0.9])[0] > 0.5
    chances.forget(3)
    assert of(chances, behind(3), [1], [0.9])[0] < 0.5
    assert chances.expected(3, 3) == sorted(chances.expected(3, 3), reverse=True)


def test_what_came_of_a_token_is_known_where_it_was_drafted() -> None:
    """Behind one token 5 never comes, behind another always; where it is new it does in half. Others' texts
    say nothing of it."""
    chances = Chances()
    for _ in range(40):
        learn(chances, behind(0, token=1), [5], [0.7], [6])
        learn(chances, behind(1, token=2), [5], [0.7], [5])
    never, always, new, other = (
        of(chances, behind(9, token, space), [5], [0.7])[0]
        for token, space in ((1, 0), (2, 0), (3, 0), (1, 12345))
    )
    assert never < 0.1 and always > 0.9
    assert 0.4 < new < 0.8 and other > 0.4
    assert of(chances, behind(9, 2), [5, 8, 5], [0.7, 0.7, 0.7], least=0.3)[0] == always


def test_what_came_of_one_token_is_believed_of_no_other() -> None:
    """However many share a place of the table."""
    chances = Chances()
    for token in range(40_000):
        learn(chances, behind(0, token), [token], [0.7], [token if token % 2 else -1])
    for token in range(80_000, 90_000):  # nobody has seen them
        assert of(chances, behind(9, token), [token], [0.7]) == of(chances, behind(9), [-2], [0.7])
    odd, even = (
        sum(of(chances, behind(9, token), [token], [0.7])[0] for token in range(first, 40_000, 2))
        for first in (1, 0)
    )
    assert odd > 1.2 * even


def test_behind_the_first_wrong_one_nothing_is_learned() -> None:
    chances = Chances()
    before = of(chances, behind(9, 3), [4], [0.55])
    for _ in range(20):
        learn(chances, behind(0, 1), [2, 3, 4], [0.9, 0.9, 0.55], [2, 9])
    assert of(chances, behind(9, 3), [4], [0.55]) == before
    assert of(chances, behind(9, 1), [2], [0.9])[0] > 0.8
    assert of(chances, behind(9, 2), [3], [0.9])[0] < 0.2


@given(
    st.lists(st.integers(-(2**40), 2**40), max_size=8),
    st.lists(st.floats(), max_size=8),
    st.lists(st.integers(0, 2**31), max_size=8),
    st.floats(0, 1),
)
def test_whatever_is_said_chances_are_some(
    tokens: list[int], said: list[float], came: list[int], least: float
) -> None:
    chances = Chances()
    for _ in range(3):
        learn(chances, behind(0), tokens, said, came)
    found = of(chances, behind(0), tokens, said, least)
    assert len(found) <= min(len(tokens), len(said))
    assert all(least <= chance <= 1 for chance in found)
    assert found == sorted(found, reverse=True)


def test_chains_are_asked_about_together() -> None:
    together, apart = Chances(), Chances()
    places = [behind(0, 1), behind(1, 2), behind(0, 3)]
    tokens, said = [[4, 5], [6], []], [[0.9, 0.8], [0.4], []]
    came = [[4, 9], [6, 7], [8]]
    for _ in range(3):
        together.learn(places, tokens, said, came)
        for each in zip(places, tokens, said, came, strict=True):
            learn(apart, *each)
    assert together.of(places, tokens, said) == [
        of(apart, *each) for each in zip(places, tokens, said, strict=True)
    ]


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=5), max_size=6),
    st.lists(st.floats(0, 0.4), min_size=31, max_size=31),
)
def test_the_likeliest_drafts_that_bring_the_most(
    chances: list[list[float]], rises: list[float]
) -> None:
    """No other number of them promises more tokens a second; in a chain none comes before those it follows."""
    chains = [sorted(chain, reverse=True) for chain in chances]
    seconds = [1.0, *(1.0 + sum(rises[:n]) for n in range(1, 31))]
    counts = best_counts(chains, seconds, 6, 1.0, 0.0)
    taken = [c for chain, n in zip(chains, counts, strict=True) for c in chain[:n]]
    ordered = sorted((c for chain in chains for c in chain), reverse=True)
    assert sorted(taken, reverse=True) == ordered[: len(taken)]
    rates = [(6 + sum(ordered[:n])) / seconds[n] for n in range(len(ordered) + 1)]
    assert rates[len(taken)] > 0.999999 * max(rates)
    assert best_counts(chains, [1.0, *[9.0] * 30], 6, 1.02, 0.9) == [0] * len(chains)


def test_who_only_loses_costs_a_set_share() -> None:
    """However much each try loses."""
    account, lost, passed = Account(), 0.0, 0.0
    for _ in range(10_000):
        passed += 1.0
        account.pass_by(1.0, 1.0)
        if account.is_open:
            account.book(-0.7)
            lost += 0.7
    assert lost < 0.006 * passed + CREDIT + 1
    for _ in range(100):
        account.pass_by(1.0, 1.0)
        account.book(0.5)
    assert account.is_open


def test_what_was_gained_may_be_lost_but_not_all_of_it() -> None:
    account = Account()
    for _ in range(1_000):
        account.pass_by(1.0, 1.0)
        account.book(1.0)
    steps = 0
    while account.is_open:
        account.book(-1.0)
        account.pass_by(1.0, 1.0)
        steps += 1
    assert CREDIT < steps <= SAVED * CREDIT + 2


def test_what_was_gained_is_not_kept_for_another_kind_of_text() -> None:
    account = Account()
    account.pass_by(1.0, 1.0)
    account.book(1_000.0)
    for _ in range(200):
        account.pass_by(1.0, 1.0)
    assert CREDIT <= account._balance < 1.05 * CREDIT


def test_nothing_that_costs_begins_on_the_last_of_a_credit() -> None:
    account = Account()
    assert account.can_begin
    account.book(-0.1)
    assert account.is_open and not account.can_begin
    account.pass_by(1.0, 1.0)
    assert account.can_begin
    account.book(-0.6 * CREDIT)
    assert account.is_open and not account.can_begin
    # Steps with prompts let it come together, too.
    for _ in range(1_000):
        account.pass_by(1.0)
    assert account.can_begin
