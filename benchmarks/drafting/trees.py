"""Chains and trees of drafts from a request's own text, on answers that are known.

A tree has several candidates for a place; it is accepted as far as one of its paths goes. Here is what it
could come to, in Python and slowly: no drafter of the engine makes trees (design note 043).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LONGEST, PLACES = 64, 16
LOOKED_AT = 128
"""Places behind the last token of which the best are taken."""


@dataclass(slots=True)
class Node:
    token: int
    parent: int
    """Its index; -1: the last known token."""
    chance: float
    """Of the whole path down to it, as the places say."""


Grown = list[Node]
"""Parents first, so that each beginning of it is a tree."""
Match = tuple[int, int]
"""A place, and how many tokens before it are those that the text ends with."""


class Text:
    """A request's tokens, of which the first `known` are there."""

    def __init__(self, tokens: Sequence[int], known: int) -> None:
        self.tokens, self.known = tokens, 0
        self._places: dict[int, list[int]] = defaultdict(list)
        self.grow(known)

    def grow(self, known: int) -> None:
        for at in range(self.known, known):
            self._places[self.tokens[at]].append(at + 1)
        self.known = known

    def matches(self) -> list[Match]:
        """The longest, and of equally long ones the latest, first."""
        end, tokens = self.known, self.tokens
        found = []
        for place in self._places[tokens[end - 1]][-LOOKED_AT - 1 :]:
            if place < end:
                length = 1
                while length < min(LONGEST, place) and (
                    tokens[place - 1 - length] == tokens[end - 1 - length]
                ):
                    length += 1
                found.append((place, length))
        return sorted(found, key=lambda match: (-match[1], -match[0]))[:PLACES]

    def accepted(self, tree: Grown) -> int:
        """How far its best path goes."""
        depth = [0] * len(tree)
        best = 0
        for i, node in enumerate(tree):
            before = depth[node.parent] if node.parent >= 0 else 0
            at = self.known + before
            is_open = node.parent < 0 or before > 0
            if is_open and at < len(self.tokens) and self.tokens[at] == node.token:
                depth[i] = before + 1
                best = max(best, depth[i])
        return best


def likely(
    text: Text, matches: Sequence[Match], path: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Tokens after the path with their chances: the longest matches have as much to say as such matches
    are right, what is left is for shorter ones (escapes as in PPM: Cleary and Witten, 1984)."""
    depth, left = len(path), 1.0
    chances: dict[int, float] = defaultdict(float)
    lengths = sorted({length for _, length in matches}, reverse=True)
    for length in lengths:
        here = [
            _token(text, place + depth, path)
            for place, own in matches
            if own == length
            and all(_token(text, place + i, path) == token for i, token in enumerate(path))
        ]
        if here:
            right = 1 - 1 / (length + depth + 0.6)
            for token in here:
                chances[token] += left * right / len(here)
            left *= 1 - right
    yield from chances.items()


def _token(text: Text, at: int, path: Sequence[int]) -> int:
    return text.tokens[at] if at < text.known else path[at - text.known] if path else -1


def chain(text: Text, most: int) -> Grown:
    return _grow(text, most, lambda depth: 1)


def fork(branches: int) -> Callable[[Text, int], Grown]:
    """At most so many first tokens, and behind each a chain."""
    return lambda text, most: _grow(text, most, lambda depth: branches if depth == 0 else 1)


def best_first(text: Text, most: int) -> Grown:
    """The likeliest nodes, wherever they are."""
    return _grow(text, most, lambda depth: PLACES)


def _grow(text: Text, most: int, width: Callable[[int], int]) -> Grown:
    """The likeliest nodes first, of those that are among so many best children at their depth."""
    matches, tree, paths = text.matches(), Grown(), list[list[int]]()
    heap: list[tuple[float, int, int, int]] = []

    def open_(parent: int, path: list[int], chance: float) -> None:
        children = sorted(likely(text, matches, path), key=lambda child: -child[1])
        for token, own in children[: width(len(path))]:
            if token >= 0:
                heapq.heappush(heap, (-chance * own, len(heap), token, parent))

    if matches:
        open_(-1, [], 1.0)
    while heap and len(tree) < most:
        chance, _, token, parent = heapq.heappop(heap)
        path = [*(paths[parent] if parent >= 0 else []), token]
        tree.append(Node(token, parent, -chance))
        paths.append(path)
        open_(len(tree) - 1, path, -chance)
    return tree


def size(tree: Grown) -> tuple[int, int]:
    """Branches and their tokens, where each is computed from the last known token on."""
    depths: list[int] = []
    leaves = set(range(len(tree)))
    for node in tree:
        depths.append(1 + (depths[node.parent] if node.parent >= 0 else 0))
        leaves.discard(node.parent)
    return max(1, len(leaves)), sum(1 + depths[leaf] for leaf in leaves) or 1
