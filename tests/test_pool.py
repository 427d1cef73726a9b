"""BlockPool against a plain model of it, invariants checked after every action."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elinvar.kv.pool import BlockPool

NUM_BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """The model: how often each block is held, and which content each cached key promises."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.refs = [0] * NUM_BLOCKS
        self.content: dict[int, bytes] = {}
        self.freed_at: dict[int, int] = {}
        self.time = 0

    def held(self) -> list[int]:
        return [block for block in range(NUM_BLOCKS) if self.refs[block]]

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        cached = {b for b in self.content if not self.refs[b]}
        plain = [b for b in range(NUM_BLOCKS) if not self.refs[b] and b not in cached]
        blocks = self.pool.allocate(count)
        assert len(blocks) == count == len(set(blocks))
        assert all(self.refs[b] == 0 for b in blocks)
        # Content is given up only for want of plain blocks, and then the oldest.
        evicted = [b for b in blocks if b in cached]
        assert len(evicted) == max(0, count - len(plain))
        oldest = sorted(cached, key=self.freed_at.__getitem__)
        assert evicted == oldest[: len(evicted)]
        for block in blocks:
            self.refs[block] = 1
            self.content.pop(block, None)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.pool.free(block)
        self.refs[block] -= 1
        self.time += 1
        self.freed_at[block] = self.time

    @precondition(lambda self: self.held())
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(self.held()))
        if block in self.content:
            return
        self.pool.publish(block, key)
        if key not in self.content.values():
            self.content[block] = key

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, key: bytes) -> None:
        block = self.pool.find(key)
        expected = next((b for b, k in self.content.items() if k == key), None)
        assert block == expected
        if block is not None:
            self.pool.share(block)
            self.refs[block] += 1

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert [self.pool.ref_count(b) for b in range(NUM_BLOCKS)] == self.refs
        assert self.pool.num_free == self.refs.count(0)
        assert all(self.pool.is_published(b) == (b in self.content) for b in range(NUM_BLOCKS))


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_light_load_touches_little_memory() -> None:
    pool = BlockPool(1000)
    touched = set()
    for _ in range(50):
        blocks = pool.allocate(3)
        touched |= set(blocks)
        for block in blocks:
            pool.free(block)
    assert touched == {0, 1, 2}
