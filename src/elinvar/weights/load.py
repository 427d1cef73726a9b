"""load_weights: a checkpoint and a family's rules to packed weights, through the pack cache.

The first load packs row chunk by row chunk and writes one file; later loads map it. Where no cache
folder can be written the weights are packed in memory. Besides them, memory holds the rows of one
chunk: of the checkpoint, which is mapped, what was read is given back after each
(docs/design/012-loading.md).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.ops.layout import (
    GROUP,
    PANEL,
    QUANTISED,
    Kinds,
    Weight,
    WeightKind,
    aligned_empty,
    pack_float,
    pack_q4,
    pack_q5,
    pack_q8,
    pack_stored,
    stored_columns,
)
from elinvar.ops.stored import STORED
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.fixes import TransposeHeads
from elinvar.weights.packfile import (
    PACK_VERSION,
    Entry,
    StalePack,
    as_value,
    pack_key,
    read_pack,
    write_pack,
)
from elinvar.weights.quants import (
    dequantize,
    kind_of,
    requantize,
    stored_kind,
    stored_parts,
    to_codes,
)
from elinvar.weights.rules import Binding, Cut, Rule, State, bind
from elinvar.weights.tensor import BLOCKS, HostTensor

Log = Callable[[str], None]
Progress = Callable[[int, int], None]
"""(bytes packed, bytes in all)"""

_CHUNK_ELEMENTS = 1 << 20
"""Matrix elements converted at once: about 30 MB of temporaries."""

_RELEASE_BYTES = 1 << 24
"""Packed before pages of the checkpoint are given back."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A weight to be packed: what it becomes, and from which stored tensor."""

    entry: Entry
    binding: Binding
    note: str
    as_f32: bool = False
    """Whatever it is stored as."""


def load_weights(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    config: ModelConfig,
    weight_format: Literal["auto", "f32", "q8"] = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    part: str = "",
    stored: Kinds = frozenset(),
) -> State:
    """All the weights of a model: matrices as Weight, vectors as float32 arrays, read-only.

    `auto` keeps the stored precision (see quants.to_codes), `f32` dequantises everything, `q8`
    quantises matrices of floats. With a cache_dir the packed weights are kept under cache_dir/packed
    and mapped the next time. part: names what `rules` load of a checkpoint, where that is not the
    model: its packed file is another.
    stored: kinds that matrices keep where files hold them so (Ops.stored). Raises ModelError for
    missing or misshapen tensors, stored types that cannot be loaded, corrupt scales, and a full disk.
    """
    log = log or (lambda _: None)
    bindings = bind(rules, checkpoint.format, config.num_layers)
    stored &= {kind for t in checkpoint.tensors.values() if (kind := stored_kind(t)) is not None}
    if weight_format == "f32":
        stored = frozenset()
    key = pack_key(checkpoint.fingerprint, weight_format, bindings, *sorted(stored))
    cut = key.hex()[:8] if any(binding.cut for binding in bindings) else ""
    what = "-".join(filter(None, (weight_format, part, cut, *sorted(stored))))
    path = _pack_path(checkpoint, what, cache_dir) if cache_dir else None
    if path is not None:
        try:
            pack = read_pack(path, key)
        except StalePack as reason:
            log(f"Packing the weights; of the packed file {path}: {reason}.")
        else:
            for note in pack.notes:
                log(note)
            log(f"Mapped the packed weights {path}.")
            return pack.state
    items = {item.entry.name: item for item in _plan(checkpoint, bindings, weight_format, stored)}
    entries = [item.entry for item in items.values()]
    counts = Counter(item.note for item in items.values() if item.entry.kind != "vector")
    notes = [
        f"{note}: {count} {'matrix' if count == 1 else 'matrices'}"
        for note, count in counts.items()
    ]
    for note in notes:
        log(note)
    chunks = _Packer(checkpoint, items, progress).chunks
    if path is not None and _can_write(path.parent):
        write_pack(path, key, entries, notes, chunks)
        log(f"Wrote the packed weights {path}.")
        return read_pack(path, key).state
    if path is not None:
        log(f"The folder {path.parent} cannot be written; the packed weights stay in memory.")
    return {entry.name: as_value(entry, _gather(entry, chunks(entry))) for entry in entries}


def replace_weights(
    checkpoint: Checkpoint,
    bindings: Sequence[Binding],
    held: State,
    weight_format: Literal["auto", "f32"] = "auto",
) -> list[str]:
    """What the bindings find in the checkpoint takes the place of what `held` has by the same names,
    which are returned: a matrix that of the Weight, which stays the object that it was, and in its
    memory where the kind is the same and nothing else is mapped there. Besides, memory holds the new
    matrix where it is not so, and the rows of one chunk. Raises as load_weights; what came before is
    replaced then."""
    items = {item.entry.name: item for item in _plan(checkpoint, bindings, weight_format)}
    packer = _Packer(checkpoint, items, None)
    for name, item in items.items():
        entry, old = item.entry, held[name]
        if entry.kind != "vector":
            assert isinstance(old, Weight)
            same = old.kind == entry.kind and _make_writable(old.data)
            data = _gather(entry, packer.chunks(entry), old.data if same else None)
            old.hold(entry.kind, data)
        else:
            held[name] = as_value(entry, _gather(entry, packer.chunks(entry)))
    return list(items)


def _make_writable(data: NDArray[np.uint8]) -> bool:
    try:
        data.flags.writeable = True
    except ValueError:  # a file, mapped to be read
        return False
    return True


def packed_entries(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    config: ModelConfig,
    weight_format: Literal["auto", "f32"] = "auto",
    stored: Kinds = frozenset(),
) -> list[Entry]:
    """What `load_weights` would give, without reading any of it. Raises as it does."""
    bindings = bind(rules, checkpoint.format, config.num_layers)
    return [item.entry for item in _plan(checkpoint, bindings, weight_format, stored)]


class _Packer:
    """Turns stored tensors into packed bytes and counts them."""

    def __init__(
        self, checkpoint: Checkpoint, items: dict[str, _Item], progress: Progress | None
    ) -> None:
        self._checkpoint, self._items = checkpoint, items
        self._progress = progress or (lambda done, total: None)
        self._total = sum(item.entry.nbytes for item in items.values())
        self._done = self._released = 0

    def chunks(self, entry: Entry) -> Iterator[NDArray[np.uint8]]:
        """The entry's packed bytes, a few panels at a time."""
        item = self._items[entry.name]
        stored = self._checkpoint.tensors[item.binding.source]
        if entry.kind == "vector":
            yield self._counted(dequantize(item.binding.vector(stored)).view(np.uint8))
            return
        rows, k = entry.shape
        step = max(1, _CHUNK_ELEMENTS // (k * PANEL)) * PANEL
        for start in range(0, rows, step):
            yield self._counted(_pack_rows(item, stored, start, min(start + step, rows)))

    def _counted(self, chunk: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self._done += chunk.nbytes
        # An embedding can be larger than all the rest: do not hold what has been read. Not after
        # each chunk: of hundreds of shards every one is told.
        if self._done - self._released >= _RELEASE_BYTES:
            self._checkpoint.release()
            self._released = self._done
        self._progress(self._done, self._total)
        return chunk


def _pack_rows(item: _Item, stored: HostTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Rows start .. stop, start a multiple of PANEL; panels of chunks follow one another."""
    tensor, cut = item.binding.rows(stored, start, stop), item.binding.cut
    columns = slice(cut.start, cut.stop) if cut and cut.axis == 1 else slice(None)
    if item.as_f32:
        return pack_float("f32", _finite(stored, dequantize(tensor))[:, columns]).data
    kind: Any = item.entry.kind
    if kind in STORED:
        parts = stored_parts(tensor)
        if cut is not None and cut.axis == 1:
            parts = stored_columns(kind, parts, cut.start, cut.stop)
        return pack_stored(kind, parts).data
    codes = to_codes(tensor)
    values = codes.values[:, columns]
    if codes.scales is None and kind == "q8":
        exact = _finite(stored, dequantize(tensor))[:, columns]
        values, scales = requantize(exact.reshape(-1, GROUP))
        return pack_q8(values.reshape(exact.shape), scales.reshape(len(exact), -1)).data
    if codes.scales is None:
        return pack_float(codes.kind, _finite(stored, values)).data
    groups = slice(cut.start // GROUP, cut.stop // GROUP) if cut and cut.axis == 1 else slice(None)
    scales = codes.scales[:, groups]
    if codes.mins is None:
        return pack_q8(values, scales).data
    pack = pack_q4 if codes.kind == "q4" else pack_q5
    return pack(values, scales, codes.mins[:, groups]).data


def _finite(stored: HostTensor, values: NDArray[Any]) -> NDArray[Any]:
    """`values` that scales went into; of stored floats, what they are is the model's affair."""
    quantised = stored.matrix is not None or BLOCKS[stored.dtype][0] > 1
    if quantised and not np.isfinite(values).all():
        raise ModelError(
            f"Tensor {stored.name} holds scales that are not finite: the file is corrupt, "
            "download it again."
        )
    return values


def _gather(
    entry: Entry, chunks: Iterator[NDArray[np.uint8]], data: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """data: where to, if not to memory of its own."""
    data = aligned_empty(entry.nbytes) if data is None else data
    at = 0
    for chunk in chunks:
        data[at : at + chunk.nbytes] = chunk
        at += chunk.nbytes
    data.flags.writeable = False
    return data


def _plan(
    checkpoint: Checkpoint,
    bindings: Sequence[Binding],
    weight_format: str,
    stored: Kinds = frozenset(),
) -> Iterator[_Item]:
    """Checks the tensors against the rules and says what each becomes."""
    tensors = checkpoint.tensors
    missing = [b.source for b in bindings if b.source not in tensors and not b.optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{checkpoint.path} lacks the tensor {missing[0]}{more}; it is not a complete "
            f"{checkpoint.architecture} model."
        )
    _check_biases(checkpoint, {b.source for b in bindings})
    for binding in bindings:
        tensor = tensors.get(binding.source)
        if tensor is None:
            continue
        if tensor.matrix is not None:  # its rows are outputs, as the unquantised file's may not be
            binding = replace(binding, transposed=False)
        expected = binding.stored_shape
        shape = binding.shape or tensor.shape
        # A matrix of one row may be stored as a vector.
        found = (1, *tensor.shape) if expected == (1, *tensor.shape) else tensor.shape
        if len(shape) not in (1, 2) or (expected and expected != found):
            wanted = list(expected) if expected else "a vector or a matrix"
            raise ModelError(
                f"Tensor {tensor.name} of {checkpoint.path} has shape {list(tensor.shape)}, and "
                f"its configuration says {wanted}."
            )
        kind, note = kind_of(tensor)
        if isinstance(binding.fix, TransposeHeads) and kind in QUANTISED:
            kind, note = "f32", f"{tensor.dtype} -> f32 (transposed)"
        elif (own := stored_kind(tensor)) and own in stored and _stays(binding, tensor, shape, own):
            kind, note = own, f"{tensor.dtype} -> {own} (as it is)"
        if weight_format == "f32":
            kind, note = "f32", f"{tensor.dtype} -> f32"
        elif weight_format == "q8" and kind in ("f32", "f16", "bf16") and shape[-1] % GROUP == 0:
            kind, note = "q8", f"{tensor.dtype} -> q8 g32 (quantised)"
        if binding.cut is not None:
            if binding.cut.axis == 1 and kind in QUANTISED:
                _check_groups(binding.name, shape[1], binding.cut)
            shape = binding.cut.of(shape)
        if len(shape) == 1:
            yield _Item(Entry(binding.name, "vector", shape), binding, "")
        else:
            yield _Item(Entry(binding.name, kind, shape), binding, note, weight_format == "f32")


def _stays(binding: Binding, tensor: HostTensor, shape: tuple[int, ...], kind: WeightKind) -> bool:
    """Whether what the rule takes of a matrix of this kind in STORED is one: no border cuts a group,
    and of blocks each panel has rows of one."""
    cut, group = binding.cut, max(GROUP, STORED[kind].group)
    if cut is not None and cut.axis == 1 and (cut.start % group or cut.stop % group):
        return False
    if tensor.matrix is None:
        return True
    rows = cut.of(shape)[0] if cut is not None else shape[0]
    return tensor.matrix.fits_panels(binding.rows(tensor, 0, rows).row_numbers)


def _check_groups(name: str, num_inputs: int, cut: Cut) -> None:
    """A group of codes with its scale stays whole."""
    if cut.start % GROUP or cut.stop % GROUP:
        groups = num_inputs // GROUP
        sizes = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        raise ModelError(
            f"The matrix {name} has {num_inputs} inputs, quantised in groups of {GROUP}, which a "
            f"part from {cut.start} to {cut.stop} would tear; share it among {sizes} ranks."
        )


def _check_biases(checkpoint: Checkpoint, used: set[str]) -> None:
    """A bias beside a matrix that is used would be dropped in silence, and the answers wrong."""
    for name, tensor in checkpoint.tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "bias" and name not in used and f"{stem}.weight" in used:
            if not dequantize(tensor).any():
                continue  # GPTQ's tools write zeros
            raise ModelError(
                f"{checkpoint.path} holds the bias {name}, and {checkpoint.architecture} models "
                "with biases are not supported."
            )


def _pack_path(checkpoint: Checkpoint, what: str, cache_dir: Path) -> Path:
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in checkpoint.path.stem)[:60]
    name = f"{stem}-{checkpoint.fingerprint[:16]}-{what}-v{PACK_VERSION}.pack"
    return cache_dir / "packed" / name


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
