"""unshard: the states that several ranks loaded, joined to the whole."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.layout import Weight, join
from elinvar.weights.rules import Cut, Rule, State, bind


def unshard(
    states: Sequence[Mapping[str, Weight | NDArray[np.float32]]],
    rules: Sequence[Sequence[Rule]],
    num_layers: int,
) -> State:
    """The whole state, to the bit what would have been loaded without cuts; states and the rules they
    were loaded by, rank by rank."""
    cuts = [_cuts(of_rank, num_layers) for of_rank in rules]
    whole: State = {}
    for name in dict.fromkeys(name for state in states for name in state):
        pieces = {
            cut[name]: state[name] for state, cut in zip(states, cuts, strict=True) if name in state
        }
        whole[name] = _joined(pieces)
    return whole


def _cuts(rules: Sequence[Rule], num_layers: int) -> dict[str, Cut | None]:
    formats = "safetensors", "gguf"
    return {b.name: b.cut for format in formats for b in bind(rules, format, num_layers)}


def _joined(
    pieces: Mapping[Cut | None, Weight | NDArray[np.float32]],
) -> Weight | NDArray[np.float32]:
    """Equal cuts are one piece: what several ranks hold."""
    if None in pieces:
        return pieces[None]
    cuts = sorted((cut for cut in pieces if cut is not None), key=lambda cut: cut.start)
    assert all(a.stop == b.start for a, b in itertools.pairwise(cuts))
    matrices = [piece for cut in cuts if isinstance(piece := pieces[cut], Weight)]
    if matrices:
        return join(matrices, cuts[0].axis)
    return np.concatenate([pieces[cut] for cut in cuts])
