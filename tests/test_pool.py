"""BlockPool against a plain model of it, invariants checked after every action."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elinvar.kv.pool import BlockPool
from elinvar.kv.tree import Tree, pack

NUM_BLOCKS = 6
NAMES = st.integers(0, 3)
"""Of contents, which are children of one root."""


class PoolMachine(RuleBasedStateMachine):
    """The model: how often each block is held, and which content each cached block promises."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(1)
        self.root = self.tree.root(b"")
        self.root.holders = 1
        self.pool = BlockPool(NUM_BLOCKS, 0, self.tree)
        self.refs = [0] * NUM_BLOCKS
        self.content: dict[int, int] = {}
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
    @rule(data=st.data(), name=NAMES)
    def publish(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.pool.publish(block, self.tree.grow(self.root, pack([name])))
        if name not in self.content.values():
            self.content[block] = name

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.pool.forget(block)
        self.content.pop(block, None)

    @rule(name=NAMES)
    def drop(self, name: int) -> None:
        node = self.tree.child(self.root, pack([name]))
        if node is not None:
            block = node.blocks[0]
            self.pool.drop(node)
            if not self.refs[block]:
                del self.content[block]

    @rule(name=NAMES)
    def share(self, name: int) -> None:
        node = self.tree.child(self.root, pack([name]))
        expected = next((b for b, n in self.content.items() if n == name), None)
        assert (node.blocks[0] if node else None) == expected
        if expected is not None:
            self.pool.share(expected)
            self.refs[expected] += 1

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        self.tree.check()
        assert [self.pool.ref_count(b) for b in range(NUM_BLOCKS)] == self.refs
        assert self.pool.num_free == self.refs.count(0)
        for block in range(NUM_BLOCKS):
            node = self.pool.node(block)
            assert (node.tokens if node else None) == (
                pack([self.content[block]]) if block in self.content else None
            )


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_light_load_touches_little_memory() -> None:
    pool = BlockPool(1000, 0, Tree(1))
    touched = set()
    for _ in range(50):
        blocks = pool.allocate(3)
        touched |= set(blocks)
        for block in blocks:
            pool.free(block)
    assert touched == {0, 1, 2}
