"""What goes to the device: a step's numbers as one transfer, and arrays that never change, once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from elinvar.base.batch import ForwardBatch, Sight, Watch
from elinvar.ops.triton.device import staging
from elinvar.ops.triton.gather import arrive

_ALIGNED = 4
"""Numbers: every array begins at 16 bytes, or kernels would be compiled for each way it may lie."""


@dataclass(slots=True)
class LastIds:
    """What the last step sampled, where it lies."""

    ids: torch.Tensor | None = None
    """[L] i32"""


class Upload:
    """A batch and its twin on the device. `fill` takes over what the batch's arrays hold by then; a token
    id ~k is that of row k in `last`."""

    def __init__(self, batch: ForwardBatch, device: torch.device, last: LastIds) -> None:
        self._ids, self._last = batch.input_ids, last
        self._arrays: list[NDArray[Any]] = []
        _mapped(batch, self._note)
        ends = np.cumsum([-(-a.size // _ALIGNED) * _ALIGNED for a in self._arrays]).tolist()
        self._host = staging(4 * ends[-1], device).view(torch.int32)
        self._device = torch.empty_like(self._host, device=device, pin_memory=False)
        numbers = self._host.numpy()
        starts = [0, *ends]
        places = list(zip(self._arrays, starts, strict=False))
        self._parts = [numbers[at : at + a.size].reshape(a.shape) for a, at in places]
        views = iter([self._device[at : at + a.size].view(a.shape) for a, at in places])
        self.batch: ForwardBatch = _mapped(batch, lambda array: next(views))

    def _note(self, array: NDArray[Any]) -> NDArray[Any]:
        self._arrays.append(array)
        return array

    def fill(self) -> None:
        for to, array in zip(self._parts, self._arrays, strict=True):
            to[:] = array
        self._device.copy_(self._host, non_blocking=True)
        if self._last.ids is not None and (self._ids < 0).any():
            arrive(cast("torch.Tensor", self.batch.input_ids), self._last.ids)


def _mapped(batch: ForwardBatch, move: Callable[[Any], Any]) -> ForwardBatch:
    """The batch with each of its arrays moved, always in one order. Shares stay: they are a result,
    which `download` brings."""

    def optional(array: Any) -> Any:
        return None if array is None else move(array)

    sight, watch = batch.sight, batch.watch
    if sight is not None:
        starts, lens, places, *tables = map(move, sight.arrays)
        sight = Sight(starts, lens, tuple(tables), places)
    if watch is not None:
        whose, starts, tokens = map(move, (watch.sequences, watch.query_start_loc, watch.tokens))
        watch = Watch(whose, starts, tokens, move(watch.positions), watch.shares)
    return replace(
        batch,
        input_ids=move(batch.input_ids),
        positions=move(batch.positions),
        query_start_loc=move(batch.query_start_loc),
        seq_lens=move(batch.seq_lens),
        block_tables=tuple(map(move, batch.block_tables)),
        slot_mapping=tuple(map(move, batch.slot_mapping)),
        logit_rows=move(batch.logit_rows),
        type_ids=optional(batch.type_ids),
        adapters=optional(batch.adapters),
        sight=sight,
        watch=watch,
    )


class Constants:
    """Tensors of the arrays that a model holds: gains, biases, tables. Known by identity, they are
    let go with their arrays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[int, torch.Tensor] = {}
        self.used: list[torch.Tensor] | None = None
        """Where given, what was asked for: a recording keeps it alive."""

    def clear(self) -> None:
        """They come again when they are asked for."""
        self._tensors.clear()

    def exchange(self, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> bool:
        """Of each pair the tensor of the first is the second's from now on, with its numbers. Whether all
        of them fit."""
        fit = True
        for old, new in pairs:
            tensor = self._tensors.pop(id(old), None)
            if tensor is None:
                continue
            if tensor.shape == new.shape and old.dtype == new.dtype:
                tensor.copy_(torch.from_numpy(np.array(new)))
                self._hold(new, tensor)
            else:
                fit = False
        return fit

    def _hold(self, array: NDArray[Any], tensor: torch.Tensor) -> None:
        self._tensors[id(array)] = tensor
        weakref.finalize(array, self._tensors.pop, id(array), None)

    def __call__(self, array: Any) -> Any:
        """Tensors are what they are, and so is None."""
        if array is None or isinstance(array, torch.Tensor):
            return array
        tensor = self._tensors.get(id(array))
        if tensor is None:
            tensor = torch.tensor(array, device=self._device)
            self._hold(array, tensor)
        if self.used is not None:
            self.used.append(tensor)
        return tensor
