"""Memory of a step on fake tensors, as a timeline of storages: how much lives at the peak, and what it is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
ACTIVATIONS = "activations"
LOGITS = "logits"
EXCHANGE = "exchange buffers"
GATHERED = "gathered weights"
WHOLE_GRADIENTS = "gradients before reduction"
TEMPORARY = "temporaries of the backward"
CATEGORIES = (
    WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, WHOLE_GRADIENTS, ACTIVATIONS, LOGITS, EXCHANGE, TEMPORARY
)  # fmt: skip


@dataclass(slots=True)
class _Storage:
    """A stretch of time in which a storage has one size. `death` is infinite while it lives."""

    category: str
    num_bytes: int
    birth: int
    death: float = float("inf")


class MemoryTimeline(TorchDispatchMode):
    """Follows every storage that is made while it is active.

    What a storage is for may show after it was made, so a category is a label that can be changed, and the peak is
    split up at the end. New storages are activations in a forward pass and temporaries in a backward pass,
    recomputation included; messages and what FSDP gathers and reduces are known by their operators.

    Args:
        logits_width: last dim by which logits are known, and `logits_numel` their number of elements.
        expand: operator -> function to run in its place, so that the memory inside it is seen.
        on_call: called with (func, args, kwargs, result) of every operator.
    """

    def __init__(
        self, *, logits_width: int = 0, logits_numel: int = 0, expand: dict[Any, Callable[..., Any]] | None = None,
        on_call: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.live = self.peak = 0
        self._clock = self._peak_time = 0
        self._logits_width, self._logits_numel = logits_width, logits_numel
        self._expand, self._on_call = expand or {}, on_call
        self._all: list[_Storage] = []
        self._current: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Storage]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> MemoryTimeline:
        timeline = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = timeline._resize(storage, size)
            timeline._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # comes back as operators on what it wraps
        if func in self._expand:
            with self:
                return self._expand[func](*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1  # a value read on the host: anything finite
        result = func(*args, **kwargs)
        self._clock += 1
        category = _category_of_new()
        for tensor in _plain_tensors(result):
            self._add(tensor, category)
        self._label_by_operator(func, args, kwargs, result)
        if self._on_call is not None:
            self._on_call(func, args, kwargs, result)
        return result

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are for, also looking back. Unknown ones count from now on."""
        for tensor in _plain_tensors(list(tensors)):
            self._add(tensor, category)
            self._entry(tensor).category = category

    def start(self) -> None:
        """Look for the peak from here on."""
        self.peak, self._peak_time = self.live, self._clock
        self._all = [s for _, s in self._current.values()]

    def at_peak(self) -> dict[str, int]:
        """Bytes of each category at the moment of the peak; they add up to `peak`."""
        return self._split(lambda s: s.birth <= self._peak_time < s.death)

    def largest(self) -> dict[str, int]:
        """The most that each category has had at any time since `start`; not at one time for all."""
        most = dict.fromkeys(CATEGORIES, 0)
        now = dict.fromkeys(CATEGORIES, 0)
        births = [(s.birth, s.num_bytes, s.category) for s in self._all]
        deaths = [(s.death, -s.num_bytes, s.category) for s in self._all]
        for _, change, category in sorted(births + deaths):
            now[category] += change
            most[category] = max(most[category], now[category])
        return most

    def at_present(self, since: int = 0) -> dict[str, int]:
        """Bytes of each category that live now and were made after `since`, a value of `clock`."""
        return self._split(lambda s: s.birth > since and s.death == float("inf"))

    @property
    def clock(self) -> int:
        """Operators so far."""
        return self._clock

    def _split(self, chosen: Callable[[_Storage], bool]) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for storage in self._all:
            if chosen(storage):
                sizes[storage.category] += storage.num_bytes
        return {category: sizes[category] for category in CATEGORIES}

    def _entry(self, tensor: Tensor) -> _Storage:
        return self._current[_key(tensor.untyped_storage())][1]

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        known = self._current.get(_key(storage))
        if known is not None and known[0]() is storage:
            return
        if tensor.shape[-1:] == (self._logits_width,) and tensor.numel() == self._logits_numel:
            category = LOGITS
        self._begin(storage, category)

    def _begin(self, storage: torch.UntypedStorage, category: str) -> None:
        key = _key(storage)
        entry = _Storage(category, storage.nbytes(), self._clock)
        self._all.append(entry)
        self._current[key] = (weakref.ref(storage, lambda ref: self._died(key, ref)), entry)
        self.live += entry.num_bytes
        if self.live > self.peak:
            self.peak, self._peak_time = self.live, self._clock

    def _died(self, key: int, ref: Any) -> None:
        known = self._current.get(key)
        if known is not None and known[0] is ref:
            self._end(known[1])
            del self._current[key]

    def _end(self, entry: _Storage) -> None:
        self.live -= entry.num_bytes
        self._clock += 1  # so that what is made next does not share a moment with it
        entry.death = self._clock

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._current.get(_key(storage))
        if known is None or known[1].num_bytes == storage.nbytes():
            return
        self._end(known[1])
        self._begin(storage, known[1].category)

    def _label_by_operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        namespace, _, name = func._schema.name.partition("::")
        if name == "all_to_all_single":
            self.label([*_plain_tensors(args), *_plain_tensors(result)], EXCHANGE)
        elif namespace == "fsdp" and name == "chunk_cat":
            self.label([*_plain_tensors(args), *_plain_tensors(kwargs)], WHOLE_GRADIENTS)
        elif namespace == "fsdp" and name == "split_with_sizes_copy":
            self.label([*_plain_tensors(args), *_plain_tensors(kwargs)], GATHERED)
        elif namespace == "fsdp" and name == "all_gather_copy_in":
            self.label(_plain_tensors(args[1]), GATHERED)


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata


def _category_of_new() -> str:
    return ACTIVATIONS if torch._C._current_graph_task_id() == -1 else TEMPORARY


def _plain_tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaf = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            yield leaf.elem if isinstance(leaf, AsyncCollectiveTensor) else leaf
