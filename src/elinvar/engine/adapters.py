"""Adapters: the LoRA adapters of one engine by name, and who still runs with which.

A loaded adapter has a number as long as it is there: requests, rows and batches carry that. One that
is unloaded refuses new requests at once; its memory is free when the last request that runs with it
ends. Its name may be taken again meanwhile: that is another number, and other cached blocks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from elinvar.base.errors import InputError, ModelError
from elinvar.models.load import Loaded
from elinvar.ops.adapted import AdaptedOps
from elinvar.weights.peft import Adapter, read_adapter

MAX_NAME = 200


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    adapter: Adapter
    num_requests: int = 0
    loaded: bool = True


class Adapters:
    """parts, ops: of the model that is adapted; without them none can be loaded. most: how many
    there may be at once. Not thread-safe, but for `read` and asking for names."""

    def __init__(
        self, parts: Loaded | None = None, ops: AdaptedOps | None = None, most: int = 0
    ) -> None:
        self._parts, self.ops, self._most = parts, ops, most
        self._by_name: dict[str, _Slot] = {}
        self._by_number: dict[int, _Slot] = {}

    def close(self) -> None:
        """Let go of all and of the model. No request may run."""
        for number in list(self._by_number):
            assert self.ops is not None
            self.ops.set_adapter(number, None)
        self._by_name.clear()
        self._by_number.clear()
        self._parts = None

    def fit(self, parts: Loaded) -> None:
        """The model has other weights. None may be held: they belong to matrices that are gone."""
        assert not self._by_number
        if self._parts is not None:
            self._parts = parts

    @property
    def names(self) -> list[str]:
        """In the order in which they were loaded."""
        return list(self._by_name)

    @property
    def num_held(self) -> int:
        """Those whose memory is not free, unloaded ones too."""
        return len(self._by_number)

    def read(self, path: str | os.PathLike[str]) -> Adapter:
        """An adapter as PEFT saves it, to be added. Takes time, and any thread. Raises ModelError when
        it cannot be read or does not fit the model."""
        parts = self._parts
        assert parts is not None, "check_new comes first"
        return read_adapter(Path(path), parts.rules, parts.config.num_layers, parts.weights)

    def check_new(self, name: str) -> None:
        """Raises InputError where an adapter of this name cannot be added now, ModelError where none
        ever can."""
        if self._parts is None:
            raise ModelError("This engine was made of a model without files: it takes no adapters.")
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise InputError(
                "adapter", f"An adapter's name must have 1 to {MAX_NAME} printable characters."
            )
        if name in self._by_name:
            raise InputError(
                "adapter",
                f"There is an adapter {name!r} already; unload it or choose another name.",
            )
        if self.num_held >= self._most:
            raise InputError(
                "adapter",
                f"max_adapters is {self._most}, and no place is free: unload an adapter or allow more.",
            )

    def add(self, name: str, adapter: Adapter) -> None:
        """Requests may ask for it from now on. Raises as `check_new` does."""
        self.check_new(name)
        assert self.ops is not None and self._parts is not None
        if not {id(w) for w in self._parts.weights.values()} >= set(map(id, adapter.pairs)):
            raise ModelError("The weights were replaced while the adapter was read; load it again.")
        number = next(i for i in range(self._most) if i not in self._by_number)
        self.ops.set_adapter(number, adapter.pairs)
        self._by_name[name] = self._by_number[number] = _Slot(number, adapter)

    def remove(self, name: str) -> None:
        """New requests do not find it any more. Raises InputError when there is none of this name."""
        slot = self.find(name)
        del self._by_name[name]
        slot.loaded = False
        self._drop_unused(slot)

    def find(self, name: str) -> _Slot:
        slot = self._by_name.get(name)
        if slot is None:
            there = f"loaded: {', '.join(self._by_name)}" if self._by_name else "none is loaded"
            raise InputError("adapter", f"There is no adapter {name[:MAX_NAME]!r}; {there}.")
        return slot

    def digest(self, name: str) -> bytes:
        """Of the content of a loaded adapter."""
        return self.find(name).adapter.digest

    def begin(self, name: str) -> int:
        """A request runs with this adapter: its number."""
        slot = self.find(name)
        slot.num_requests += 1
        return slot.number

    def end(self, number: int) -> None:
        """The request has ended."""
        slot = self._by_number[number]
        slot.num_requests -= 1
        self._drop_unused(slot)

    def _drop_unused(self, slot: _Slot) -> None:
        if not slot.loaded and slot.num_requests == 0:
            assert self.ops is not None
            self.ops.set_adapter(slot.number, None)
            del self._by_number[slot.number]
