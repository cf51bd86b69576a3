"""Reading and writing through a mapping: a list of `Stored` tensors that are made of ours."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Mapping, Part, Stored, Unit, whole
from dmoe.checkpoint.formats.names import cast_dtype, has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.safetensors_write import Outline
from dmoe.checkpoint.formats.store import Source, TensorSink, TensorStore
from dmoe.config import ModelConfig
from dmoe.errors import RunError

CACHE_BYTES = 512 << 20


class MappedSource:
    """A model that lies in `store` in the form that `mapping` describes, as a `Source`.

    A read holds the tensor that is returned, one stored tensor or row, and the last stored tensor, of at most 512 MiB,
    of which a part was taken (fused projections are read once).

    Raises:
        RunError: the store has tensors that the mapping lacks or the other way round (each listed, up to 10), or
            tensors of other shapes. Names files.
        ValueError: the mapping itself does not fill every tensor of `config` once.
    """

    def __init__(
        self, store: TensorStore, mapping: Mapping, config: ModelConfig, *, ignored: Iterable[str] = ()
    ) -> None:
        self.config = config
        self._store = store
        self._shapes = tensor_shapes(config)
        mapping = by_rows(mapping, self._shapes)
        _check_store(store, mapping, set(ignored))
        self._places = _places(mapping, self._shapes)
        self._last: tuple[str, int | None, Tensor] | None = None

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def dtype(self, name: str) -> torch.dtype:
        units = self._places[name]
        dtypes = {self._store.dtype(stored.name) for places in units.values() for stored, _ in places}
        result, *others = dtypes
        for other in others:
            result = torch.promote_types(result, other)
        return result

    def read(self, name: str, index: int | None = None) -> Tensor:
        units, shape = self._places[name], self._shapes[name]
        if index is not None and None in units:  # not stored by rows
            return self.read(name)[index].clone()
        if index is not None:
            tensor = torch.empty(shape[1:], dtype=self.dtype(name))
            self._fill(tensor, units[index])
            return tensor
        tensor = torch.empty(shape, dtype=self.dtype(name))
        for row, places in units.items():
            self._fill(tensor if row is None else tensor[row], places)
        return tensor

    def _fill(self, tensor: Tensor, places: list[tuple[Stored, Part]]) -> None:
        for stored, part in places:
            content = self._content(stored, part)
            region, ours = part.place(content), part.view(tensor)
            if region.shape != ours.shape:
                shapes = list(region.shape), list(ours.shape)
                raise ValueError(f"{stored.name}: a region {shapes[0]} of it is mapped to {shapes[1]} of {part.ours}")
            ours.copy_(region)

    def _content(self, stored: Stored, part: Part) -> Tensor:
        if self._last is not None and self._last[:2] == (stored.name, part.stored_index):
            return self._last[2]
        content = self._store.read(stored.name, part.stored_index)
        self._last = None
        if len(stored.parts) > 1 and content.nbytes <= CACHE_BYTES:
            self._last = stored.name, part.stored_index, content
        return content


def write_mapped(source: Source, mapping: Mapping, sink: TensorSink, dtype: torch.dtype | None = None) -> None:
    """Write every tensor of `mapping`, made of those of `source`, to `sink`; the caller closes it.

    One stored tensor at a time, or one row of it where all its parts give a row and the sink has
    `write_row(name, index, tensor)`. Rows of ours that later tensors need too are kept, up to 512 MiB, the oldest
    forgotten first. So memory is bounded by that, the largest row or tensor of ours and the largest of theirs.

    Args:
        dtype: of what is written, where the format has no dtype of its own. None: as it is in the source.
    """
    shapes = tensor_shapes(source.config)
    mapping = by_rows(mapping, shapes)
    _places(mapping, shapes)
    outlines = stored_outlines(source, mapping, dtype)
    units = _Units(source, mapping)
    write_row = getattr(sink, "write_row", None)
    for stored in mapping:
        shape, kind = outlines[stored.name]
        if write_row is not None and all(part.stored_index is not None for part in stored.parts) and stored.parts:
            rows: dict[int, list[Part]] = {row: [] for row in range(shape[0])}
            for part in stored.parts:
                rows[part.stored_index].append(part)  # type: ignore[index]
            for row, parts in rows.items():
                write_row(stored.name, row, _assemble(torch.zeros(shape[1:], dtype=kind), parts, units))
            continue
        tensor = torch.zeros(shape, dtype=kind)
        for part in stored.parts:
            _assemble(tensor if part.stored_index is None else tensor[part.stored_index], [part], units)
        sink.write(stored.name, tensor)


def stored_outlines(source: Source, mapping: Mapping, dtype: torch.dtype | None = None) -> dict[str, Outline]:
    """Shape and dtype of each tensor that `write_mapped` writes, in the mapping's order."""
    kinds = {name: cast_dtype(name, source.dtype(name), dtype) for name in source.names()}

    def kind(stored: Stored) -> torch.dtype:
        if stored.dtype is not None:
            return stored.dtype
        found = {kinds[part.ours] for part in stored.parts}
        result = found.pop()
        for other in found:
            result = torch.promote_types(result, other)
        return result

    return {stored.name: Outline(stored.shape, kind(stored)) for stored in mapping}


def by_rows(mapping: Mapping, shapes: dict[str, tuple[int, ...]]) -> list[Stored]:
    """The mapping with experts that are stored as ours are, all in one tensor, parted into rows."""

    def parted(stored: Stored) -> Stored:
        (part, *others) = stored.parts or (None,)
        plain = part is not None and not others and part.unit.index is None and part.stored_index is None
        if part is None or not plain or not has_expert_rows(part.ours):
            return stored
        if part.view is not whole or part.place is not whole or stored.shape != shapes.get(part.ours):
            return stored
        rows = tuple(replace(part, index=i, stored_index=i) for i in range(stored.shape[0]))
        return replace(stored, parts=rows)

    return [parted(stored) for stored in mapping]


def listed(names: Iterable[str]) -> str:
    """Up to 10 names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


class _Units:
    """Rows of ours, each kept until the last stored tensor that needs it is written."""

    def __init__(self, source: Source, mapping: Sequence[Stored]) -> None:
        self._source = source
        self._uses = Counter(part.unit for stored in mapping for part in stored.parts)
        self._kept: OrderedDict[Unit, Tensor] = OrderedDict()
        self._bytes = 0

    def take(self, unit: Unit) -> Tensor:
        self._uses[unit] -= 1
        tensor = self._kept.get(unit)
        if tensor is None:
            tensor = self._source.read(unit.name, unit.index)
            if self._uses[unit] and tensor.nbytes <= CACHE_BYTES:
                self._kept[unit] = tensor
                self._bytes += tensor.nbytes
        elif not self._uses[unit]:
            self._bytes -= self._kept.pop(unit).nbytes
        while self._bytes > CACHE_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return tensor


def _assemble(tensor: Tensor, parts: list[Part], units: _Units) -> Tensor:
    for part in parts:
        region, ours = part.place(tensor), part.view(units.take(part.unit))
        if region.shape != ours.shape:
            raise ValueError(f"{part.ours}: {list(ours.shape)} of it is mapped to a region {list(region.shape)}")
        region.copy_(ours)
    return tensor


def _check_store(store: TensorStore, mapping: Sequence[Stored], ignored: set[str]) -> None:
    found, wanted = set(store.names()), {stored.name for stored in mapping}
    where = store.where(next(iter(sorted(found)))) if found else "the source"
    if unknown := found - wanted - ignored:
        where = store.where(min(unknown))
        raise RunError(f"{where}: {len(unknown)} tensors are not of this kind of model: {listed(unknown)}")
    if missing := wanted - found:
        raise RunError(f"{where}: {len(missing)} tensors of the model are missing: {listed(missing)}")
    for stored in mapping:
        shape = store.shape(stored.name)
        if shape != stored.shape:
            raise RunError(
                f"{store.where(stored.name)}: {stored.name} has shape {list(shape)}: must be {list(stored.shape)} "
                "by the configuration"
            )
        if not store.dtype(stored.name).is_floating_point:
            raise RunError(
                f"{store.where(stored.name)}: {stored.name} is {store.dtype(stored.name)}: must be floating point"
            )


_Places = dict[str, dict[int | None, list[tuple[Stored, Part]]]]


def _places(mapping: Sequence[Stored], shapes: dict[str, tuple[int, ...]]) -> _Places:
    """Where each row of ours lies. Checks by the number of elements that each is filled once, and each stored tensor
    too, but for padding."""
    places: _Places = {name: defaultdict(list) for name in shapes}
    for stored in mapping:
        covered = 0
        for part in stored.parts:
            if part.ours not in shapes:
                raise ValueError(f"{stored.name} is mapped to {part.ours}, which the model does not have")
            places[part.ours][part.index].append((stored, part))
            covered += _numel(part, shapes)
        if covered != math.prod(stored.shape) and not (stored.padded and covered < math.prod(stored.shape)):
            raise ValueError(f"{stored.name} has {math.prod(stored.shape)} elements, of which {covered} are mapped")
    for name, units in places.items():
        filled = sum(_numel(part, shapes) for found in units.values() for _, part in found)
        if filled != math.prod(shapes[name]):
            raise ValueError(f"{name} has {math.prod(shapes[name])} elements, of which {filled} are mapped")
        rows = set(units)
        if rows != {None} and rows != set(range(shapes[name][0])):
            raise ValueError(f"{name} is mapped by rows {sorted(map(str, rows))}: must be whole, or each row")
    return places


def _numel(part: Part, shapes: dict[str, tuple[int, ...]]) -> int:
    shape = shapes[part.ours]
    shape = shape if part.index is None else shape[1:]
    return math.prod(shape) if part.view is whole else part.view(torch.empty(shape, device="meta")).numel()
