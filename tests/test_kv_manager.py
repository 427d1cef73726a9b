"""KVManager: prefix matching, sliding windows, eviction; and a state machine over sequences."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from elinvar.base.config import DeltaConfig, KVSpec
from elinvar.kv.manager import KVManager
from elinvar.kv.need import NEVER
from elinvar.kv.sequence import Kept, Prefix, SequenceKV
from elinvar.kv.tree import Node, pack

SIZE = 4
STATE = 0
"""Among windows: a group of recurrent states."""


def spec(window: int | None = None) -> KVSpec:
    if window == STATE:
        return KVSpec("linear", (0,), 1, 8, block_size=SIZE, state=DeltaConfig(1, 1, 16, 16, 2))
    kind = "full" if window is None else "sliding"
    return KVSpec(kind, (0,), 1, 8, window=window, block_size=SIZE)  # type: ignore[arg-type]


def manager(*windows: int | None, blocks: int = 32, **options: object) -> KVManager:
    num_blocks = [1 + blocks % 9 if w == STATE else blocks for w in windows]
    return KVManager([spec(w) for w in windows], num_blocks, **options)  # type: ignore[arg-type]


def compute(kv: KVManager, tokens: list[int], step: int = 1000) -> tuple[SequenceKV, Prefix]:
    """Run a sequence over `tokens` in steps of `step`."""
    seq = kv.new_sequence()
    prefix: Prefix | None = kv.find_prefix(seq, tokens)
    assert prefix is not None
    found, done = prefix, prefix.num_tokens
    while done < len(tokens):
        allocation = kv.prepare(seq, done, min(len(tokens), done + step), prefix)
        assert allocation is not None
        kv.apply(allocation)
        prefix, done = None, allocation.end
        kv.advance(seq, tokens, done)
    return seq, found


def path(kv: KVManager, tokens: list[int]) -> list[Node]:
    """The nodes of the whole blocks of `tokens`, as far as there are any."""
    nodes = [kv.tree.root(kv.new_sequence().root)]
    for at in range(0, len(tokens) - SIZE + 1, SIZE):
        child = kv.tree.child(nodes[-1], pack(tokens[at : at + SIZE]))
        if child is None:
            break
        nodes.append(child)
    return nodes[1:]


def hit(kv: KVManager, tokens: list[int]) -> int:
    return kv.find_prefix(kv.new_sequence(), tokens).num_tokens


def test_a_prefix_is_found_to_the_token_and_leaves_one() -> None:
    kv = manager(None)
    tokens = list(range(11))
    seq, _ = compute(kv, tokens)
    for _ in range(2):
        assert hit(kv, tokens) == 10
        assert hit(kv, [*tokens, 99]) == 11
        assert hit(kv, [*tokens[:7], 99, 98]) == 7
        assert hit(kv, [*tokens[:10], 99, 98]) == 10
        assert hit(kv, [99, *tokens[1:]]) == 0
        assert hit(kv, tokens[:3]) == 2
        kv.free(seq, tokens, len(tokens))  # and the same when nobody holds it


def test_a_tail_is_copied_and_the_source_stays() -> None:
    kv = manager(None, 5)
    tokens = list(range(10))
    compute(kv, tokens)
    other = kv.new_sequence()
    longer = [*tokens, 20, 21, 22]
    prefix = kv.find_prefix(other, longer)
    allocation = kv.prepare(other, prefix.num_tokens, 13, prefix)
    assert allocation is not None and prefix.num_tokens == 10 and prefix.tail is not None
    sources = prefix.tail.blocks[:]
    taken = kv.apply(allocation)
    assert [(c.group, c.source, c.target) for c in taken.copies] == [
        (group, sources[group], other.tables[group][2]) for group in (0, 1)
    ]
    assert prefix.tail.blocks == sources
    assert all(table[2] != source for table, source in zip(other.tables, sources, strict=True))


def test_a_tail_alone_in_a_full_pool_is_copied_onto_itself() -> None:
    kv = manager(None, blocks=2)
    tokens = list(range(6))
    seq, _ = compute(kv, tokens)
    kv.free(seq, tokens, 6)
    seq, found = compute(kv, [*tokens, 8])
    assert found.num_tokens == 6
    kv.check([seq])


def test_what_is_unknown_is_not_found() -> None:
    kv = manager(None)
    tokens = list(range(8))
    seq, _ = compute(kv, tokens)
    more = [*tokens, 8, 9]
    allocation = kv.prepare(seq, 8, 10)
    assert allocation is not None
    kv.apply(allocation)
    kv.free(seq)  # whether its last step ran nobody knows
    assert hit(kv, [*more, 10]) == 8


def test_who_begins_alike_may_wait_for_what_is_coming() -> None:
    kv = manager(None)
    tokens = list(range(30))
    seq = kv.new_sequence()
    allocation = kv.prepare(seq, 0, 12, kv.find_prefix(seq, tokens))
    assert allocation is not None
    kv.apply(allocation)
    coming = lambda ids: kv.find_prefix(kv.new_sequence(), ids).coming  # noqa: E731
    assert coming(tokens) is not None and coming([*tokens[:9], 1]) is not None
    assert coming([7, 8, 9, 10, 11]) is None
    kv.advance(seq, tokens, 12)
    assert coming(tokens) is not None and coming([*tokens[:9], 1]) is None
    kv.check([seq])
    kv.free(seq)
    assert coming(tokens) is None
    kv.check([])


def test_a_longer_tail_takes_the_place_of_a_shorter_one() -> None:
    kv = manager(None)
    seq, _ = compute(kv, [1, 2])
    kv.free(seq, [1, 2], 2)
    assert len(kv.pools[0].cached) == 1
    seq, _ = compute(kv, [1, 2, 3])
    kv.free(seq, [1, 2, 3], 3)
    assert len(kv.pools[0].cached) == 1
    assert hit(kv, [1, 2, 3, 4]) == 3
    assert hit(kv, [1, 2, 9, 4]) == 2


def test_blocks_are_visible_after_commit_only() -> None:
    kv = manager(None)
    seq = kv.new_sequence()
    tokens = list(range(9))
    allocation = kv.prepare(seq, 0, 9, kv.find_prefix(seq, tokens))
    assert allocation is not None
    kv.apply(allocation)
    assert kv.find_prefix(kv.new_sequence(), tokens).num_tokens == 0
    kv.advance(seq, tokens, 5)
    assert kv.find_prefix(kv.new_sequence(), tokens).num_tokens == 4


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    kv = manager(None)
    compute(kv, [1, 1, 1, 1, 2, 2, 2, 2])
    assert kv.find_prefix(kv.new_sequence(), [3, 3, 3, 3, 2, 2, 2, 2, 9]).num_tokens == 0
    assert kv.find_prefix(kv.new_sequence(), [2, 2, 2, 2, 9]).num_tokens == 0


def test_namespaces_and_the_switch() -> None:
    tokens = list(range(9))
    keys = []
    for namespace in ("one", "two"):
        seq, _ = compute(manager(None, namespace=namespace), tokens)
        keys.append([node.key for node in seq.nodes])
    assert keys[0] != keys[1]
    kv = manager(None, prefix_cache=False)
    seq, _ = compute(kv, tokens)
    kv.free(seq)
    assert compute(kv, tokens)[1].num_tokens == 0


def test_the_beginning_survives_longest() -> None:
    kv = manager(None, blocks=4)
    tokens = list(range(16))
    seq, _ = compute(kv, tokens)
    kv.free(seq)
    other, _ = compute(kv, list(range(100, 108)))
    assert kv.find_prefix(kv.new_sequence(), [*tokens, 1]).num_tokens == 8
    kv.check([other])


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 8, 13])
@pytest.mark.parametrize("step", [1, 3, 50])
def test_sliding_holds_the_window_and_no_more(window: int, step: int) -> None:
    kv = manager(None, window)
    tokens = list(range(45))
    seq = kv.new_sequence()
    done = 0
    while done < len(tokens):
        allocation = kv.prepare(seq, done, min(done + step, len(tokens)))
        assert allocation is not None
        kv.apply(allocation)
        for index, block in enumerate(seq.tables[1]):
            needed = (index + 1) * SIZE - 1 >= done - window + 1
            assert (block >= 0) == needed
        done = allocation.end
        if done >= seq.next_event:
            kv.advance(seq, tokens, done)
        assert done < seq.next_event
        kv.check([seq])
    assert -1 not in seq.tables[0]


def test_a_hit_needs_only_the_window_of_a_sliding_group() -> None:
    kv = manager(None, 8, blocks=16)
    tokens = list(range(32))
    seq, _ = compute(kv, tokens, step=4)
    kv.free(seq)
    # Eight plain blocks of the sliding group and two cached ones, of positions 0..7, are reused.
    kv.pools[1].allocate(10)
    prefix = kv.find_prefix(kv.new_sequence(), [*tokens, 1])
    assert prefix.num_tokens == 32
    assert prefix.blocks[1][:6] == [-1] * 6 and min(prefix.blocks[1][6:]) >= 0
    assert prefix.num_taken == [8, 2]
    # The hit point 8 would need the blocks of 0..7, which are gone; of 16 those of 8..15.
    assert kv.find_prefix(kv.new_sequence(), tokens[:9]).num_tokens == 0
    assert kv.find_prefix(kv.new_sequence(), tokens[:17]).num_tokens == 16


def test_a_gap_in_one_group_shortens_the_prefix_of_all() -> None:
    kv = manager(None, 4, 9)
    tokens = list(range(24))
    seq, _ = compute(kv, tokens)
    pool = kv.pools[2]
    kv.free(seq)
    nodes = path(kv, tokens)
    for node in nodes[:4] + nodes[5:]:
        pool.share(node.blocks[2])
    pool.allocate(pool.num_free)
    assert nodes[4].blocks[2] == -1
    assert kv.find_prefix(kv.new_sequence(), [*tokens, 1]).num_tokens == 16


def test_prepare_changes_nothing_and_gives_what_there_is() -> None:
    kv = manager(None, 8, blocks=4)
    seq = kv.new_sequence()
    kv.pools[1].allocate(1)
    allocation = kv.prepare(seq, 0, 100)
    assert allocation is not None and allocation.end == 12
    assert [pool.num_free for pool in kv.pools] == [4, 3]
    kv.apply(allocation)
    assert kv.prepare(seq, 12, 13) is None
    assert [pool.num_free for pool in kv.pools] == [1, 0]


def computed(seq: SequenceKV, tokens: Sequence[int]) -> tuple[int, ...]:
    """What keys and values of these tokens depend on; behind those shared, on what was chosen."""
    seen = tuple(token + 10 * sum(seq.kept or ()) for token in tokens)
    return seen[: seq.shared] + tuple(id(seq) + token for token in seen[seq.shared :])


class ManagerMachine(RuleBasedStateMachine):
    """Sequences of a two-token alphabet come, share, grow, end and push each other out.

    `content` says for every published block which token prefix its key promised; a hit must give
    blocks that hold exactly the sequence's own prefix. What sequences that forget compute is told
    apart by what they keep. Some see every other block alone of what they share.
    """

    @initialize(
        windows=st.sampled_from(
            [
                *[(None,), (5,), (None, 5), (None, 1), (4, None, 9), (3, 8)],
                *[(None, STATE), (STATE,), (None, 5, STATE)],
            ]
        ),
        blocks=st.integers(3, 14),
    )
    def start(self, windows: tuple[int | None, ...], blocks: int) -> None:
        self.kv = manager(*windows, blocks=blocks)
        self.states = [group for group, window in enumerate(windows) if window == STATE]
        self.live: list[tuple[SequenceKV, list[int], list[int]]] = []
        self.written: list[dict[int, tuple[int, ...]]] = [{} for _ in windows]

    def write(self, seq: SequenceKV, tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            index = position // SIZE
            for group, table in enumerate(seq.tables):
                if group in self.states and position < end - 1:
                    continue
                block = table[index]
                node = self.kv.pools[group].node(block)
                assert self.kv.pools[group].ref_count(block) == 1
                assert node is None or group not in self.states
                assert node is None or node.num_tokens <= position % SIZE
                self.written[group][block] = computed(seq, tokens[: position + 1])

    def read(self, seq: SequenceKV, tokens: list[int], start: int, end: int) -> None:
        for group, (table, window) in enumerate(zip(seq.tables, self.kv.windows, strict=True)):
            if group in self.states:
                continue
            first = 0 if window is None else max(0, start - window + 1) // SIZE
            always = range(0)
            if window is None and seq.kept is not None:
                first = max(0, start // SIZE - seq.kept[1])
                always = range(min(seq.kept[0], first))
            for index in [*always, *range(first, (end - 1) // SIZE + 1)]:
                if window is None and index in seq.dropped:
                    continue
                content = computed(seq, tokens[: min(end, (index + 1) * SIZE)])
                assert self.written[group][table[index]] == content

    def grow(
        self, seq: SequenceKV, tokens: list[int], done: int, step: int, prefix: Prefix | None
    ) -> int:
        most = len(tokens) if done >= seq.shared else min(seq.shared, len(tokens))
        allocation = self.kv.prepare(seq, done, min(done + step, most), prefix)
        if allocation is None:
            return done
        before = self.state_blocks(seq, prefix)
        for copy in self.kv.apply(allocation).copies:
            content = self.written[copy.group][copy.source]
            if copy.group in self.states:
                assert content == computed(seq, tokens[:done])
                before[copy.group] = copy.target
            assert content[:done] == computed(seq, tokens[:done])
            self.written[copy.group][copy.target] = content[:done]
        for group, block in before.items():
            assert self.written[group][block] == computed(seq, tokens[:done]), "another's state"
            assert self.kv.pools[group].ref_count(block) > 0, "may be given to somebody else"
        self.write(seq, tokens, done, allocation.end)
        self.read(seq, tokens, done, allocation.end)
        self.kv.advance(seq, tokens, allocation.end)
        if allocation.end == seq.shared:
            last = len(seq.tables[0]) - 1
            self.kv.keep(seq, [*range(0, last, 2), last])
        if seq.kept is not None:
            for table, window in zip(seq.tables, self.kv.windows, strict=True):
                seen = allocation.end // SIZE - seq.kept[1]
                held = len(table) - table.count(-1)
                assert window is not None or held == len(table) - max(0, seen - seq.kept[0])
        return allocation.end

    def state_blocks(self, seq: SequenceKV, prefix: Prefix | None) -> dict[int, int]:
        """Those that the sequence goes on from."""
        tables = seq.tables if prefix is None else prefix.blocks
        return {group: tables[group][-1] for group in self.states if tables[group]}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        step=st.integers(1, 30),
        kept=st.sampled_from([None, (1, 1), (1, 2)]),
    )
    def arrive(self, tokens: list[int], step: int, kept: Kept | None, shared: int = NEVER) -> None:
        sought = NEVER if shared == NEVER else max(1, shared - 3)
        seq = self.kv.new_sequence(str(kept).encode(), kept, shared, sought)
        prefix = self.kv.find_prefix(seq, tokens)
        assert prefix.num_tokens < min(len(tokens), sought)
        done = self.grow(seq, tokens, prefix.num_tokens, step, prefix)
        if seq.capacity:
            self.live.append((seq, tokens, [done]))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        step=st.integers(1, 30),
        shared=st.integers(1, 30),
    )
    def arrive_to_choose(self, tokens: list[int], step: int, shared: int) -> None:
        self.arrive(tokens, step, None, min(shared, len(tokens)))

    @rule(data=st.data())
    def arrive_again(self, data: st.DataObject) -> None:
        if self.live:
            seq, tokens, _ = data.draw(st.sampled_from(self.live))
            more = data.draw(st.lists(st.integers(0, 1), max_size=6))
            shared = NEVER if seq.kept else data.draw(st.sampled_from([NEVER, len(tokens)]))
            self.arrive([*tokens, *more], data.draw(st.integers(1, 30)), seq.kept, shared)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), step=st.integers(1, 9), token=st.integers(0, 1))
    def append(self, data: st.DataObject, step: int, token: int) -> None:
        seq, tokens, done = data.draw(st.sampled_from(self.live))
        tokens.append(token)
        done[0] = self.grow(seq, tokens, done[0], step, None)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), known=st.booleans())
    def end(self, data: st.DataObject, known: bool) -> None:
        entry = data.draw(st.sampled_from(self.live))
        self.live.remove(entry)
        seq, tokens, done = entry
        self.kv.free(seq, tokens, done[0] if known else 0)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check([seq for seq, _, _ in self.live])

    def teardown(self) -> None:
        if hasattr(self, "kv"):
            for seq, _, _ in self.live:
                self.kv.free(seq)
            self.kv.check([])
            assert all(pool.num_free == pool.num_blocks for pool in self.kv.pools)


ManagerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestManager = ManagerMachine.TestCase


# ---- sequences that forget ------------------------------------------------------------------------


def test_a_sequence_that_forgets_needs_what_it_keeps_and_goes_on_from_it() -> None:
    kv, tokens, kept = manager(None, blocks=4), list(range(41)), (1, 2)
    assert kv.longest(kept) > 10**9 and kv.longest((1, 3)) == kv.longest(None) == 4 * SIZE
    seq, done = kv.new_sequence(b"", kept), 0
    prefix: Prefix | None = kv.find_prefix(seq, tokens)
    while done < len(tokens):
        allocation = kv.prepare(seq, done, len(tokens), prefix)
        assert allocation is not None
        kv.apply(allocation)
        prefix, done = None, allocation.end
        kv.advance(seq, tokens, done)
        assert done < seq.next_event
        kv.check([seq])
    assert [block >= 0 for block in seq.tables[0]] == [True] + [False] * 7 + [True] * 3
    kv.free(seq, tokens, done)
    again = kv.find_prefix(kv.new_sequence(b"", kept), [*tokens, 1])
    assert again.num_tokens == 41 and again.blocks[0].count(-1) == 7
    # Without its last blocks it can end where those before are: nowhere.
    other = kv.new_sequence(b"other")
    allocation = kv.prepare(other, 0, 8, kv.find_prefix(other, tokens))
    assert allocation is not None
    kv.apply(allocation)
    assert kv.find_prefix(kv.new_sequence(b"", kept), [*tokens, 1]).num_tokens <= SIZE


# ---- recurrent states -------------------------------------------------------------------------


def states(blocks: int = 64, states: int = 8) -> KVManager:
    """Snapshots for keeps every five blocks: a state weighs 640 bytes and a block of keys 128."""
    return KVManager([spec(None), spec(STATE)], [blocks, states])


def snapshots(kv: KVManager, tokens: list[int]) -> list[int]:
    """Borders in `tokens` at which a state can be found."""
    nodes = path(kv, tokens)
    return [(i + 1) * SIZE for i, node in enumerate(nodes) if node.blocks[1] >= 0]


def test_a_chunk_ends_where_a_snapshot_is_left() -> None:
    kv, tokens = states(), list(range(50))
    seq = kv.new_sequence()
    prefix: Prefix | None = kv.find_prefix(seq, tokens)
    done, ends = 0, []
    while done < len(tokens):
        allocation = kv.prepare(seq, done, len(tokens), prefix)
        assert allocation is not None
        assert sum(block >= 0 for block in kv.apply(allocation).blocks[1]) == 1
        prefix, done = None, allocation.end
        kv.advance(seq, tokens, done)
        ends.append(done)
        kv.check([seq])
    assert ends == [20, 40, 48, 50]
    assert snapshots(kv, [*tokens, 1]) == [20, 40, 48]
    assert kv.find_prefix(kv.new_sequence(), tokens).num_tokens == 48
    assert kv.find_prefix(kv.new_sequence(), tokens[:47]).num_tokens == 40
    assert sum(block >= 0 for block in seq.tables[1]) == 1, "it holds its own state alone"


def test_sequences_that_part_leave_a_snapshot_where_they_do() -> None:
    kv, tokens = states(), list(range(19))
    compute(kv, tokens)
    assert snapshots(kv, tokens) == [16]
    # Its keys serve 12 of the other's tokens; only a state at 0 does.
    _, found = compute(kv, [*tokens[:13], *range(100, 130)])
    assert found.num_tokens == 0 and found.marks == (12, 40)
    _, found = compute(kv, [*tokens[:13], *range(200, 205)])
    assert found.num_tokens == 12


def test_decoding_keeps_the_last_snapshot_alone() -> None:
    kv, tokens = states(), list(range(9))
    seq, _ = compute(kv, tokens)
    for token in range(9, 38):
        tokens.append(token)
        allocation = kv.prepare(seq, token, token + 1)
        assert allocation is not None
        kv.apply(allocation)
        kv.advance(seq, tokens, token + 1)
    # That of the prompt's end, that of every fifth block, and the last one.
    assert snapshots(kv, [*tokens, 1, 2]) == [8, 20, 36]
    kv.free(seq)
    assert kv.find_prefix(kv.new_sequence(), [*tokens, 1]).num_tokens == 36


def test_a_snapshot_is_given_up_where_it_would_cost_a_block() -> None:
    kv, tokens = states(states=1), list(range(30))
    seq, _ = compute(kv, tokens)
    assert snapshots(kv, tokens) == []
    kv.free(seq)
    # Alone, a sequence even takes over the state that it begins from.
    seq, _ = compute(kv, tokens[:20])
    kv.free(seq)
    seq, found = compute(kv, tokens)
    assert found.num_tokens == 20
    kv.check([seq])


def test_two_that_begin_from_one_state_do_not_write_to_it() -> None:
    kv, tokens = states(), list(range(20))
    first, _ = compute(kv, tokens)
    both = [kv.new_sequence() for _ in range(2)]
    longer = [[*tokens, n, n] for n in (7, 8)]
    blocks = []
    for seq, ids in zip(both, longer, strict=True):
        prefix = kv.find_prefix(seq, ids)
        allocation = kv.prepare(seq, prefix.num_tokens, len(ids), prefix)
        assert allocation is not None and prefix.num_tokens == 20
        blocks += [prefix.blocks[1][-1], kv.apply(allocation).blocks[1][-1]]
    assert blocks[0] == blocks[2] and len(set(blocks)) == 3
    kv.check([first, *both])
    for seq, ids in zip(both, longer, strict=True):
        kv.advance(seq, ids, len(ids))
    assert kv.pools[1].ref_count(blocks[0]) == 1, "held by the one that wrote it"
