"""`MemoryTimeline`: every storage of a training step from its creation to its end, on real or fake tensors."""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmoe.observe.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    CAST,
    CATEGORIES,
    EXCHANGE,
    FORWARD,
    GATHERED,
    LOGITS,
    OTHER,
    TEMPORARY,
    WEIGHTS,
    WHOLE_GRADIENTS,
)  # fmt: skip
from dmoe.observe.memory.failure_kinds import is_out_of_memory

_NEVER = sys.maxsize
_STACK_FROM = 2**14  # bytes of a storage whose stack is worth keeping
_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen", "<string>")


@dataclass(slots=True)
class Storage:
    """A stretch of time in which a storage has one size. Times count operators and deaths."""

    category: str
    num_bytes: int
    birth: int
    death: int = _NEVER
    stack: tuple[str, ...] = ()
    """Where it was made, innermost first; see `MemoryTimeline`."""


class MemoryTimeline(TorchDispatchMode):
    """Follows every storage that is made while it is active; `account.account_of` sums up what it saw.

    What a storage is for may show after it was made, so a category is a label that can be changed later. New storages
    are activations in a forward pass and temporaries in a backward pass, recomputation included; messages and what FSDP
    gathers and reduces are known by their operators. Memory inside an operator is not seen, but that of `expand`.

    Args:
        device: type of the device whose memory counts.
        logits_width: last dim by which logits are known, and `logits_numel` their number of elements; 0 for any number.
        expand: operator -> function to run in its place, so that the memory inside it is seen.
        on_call: called with (func, args, kwargs, result) of every operator.
        rounding: every storage takes a multiple of so many bytes.
        stacks: note for each storage of 16 KiB and more which lines of Python, outside torch, made it.
    """

    def __init__(
        self, *, device: str = "cpu", logits_width: int = 0, logits_numel: int = 0,
        expand: dict[Any, Callable[..., Any]] | None = None, on_call: Callable[..., None] | None = None,
        rounding: int = 1, stacks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.storages: list[Storage] = []
        """Those that lived at `start` or were made after it."""
        self.began = 0
        """The time of `start`."""
        self.seconds: list[tuple[int, float]] = []
        """(time, seconds by `time.perf_counter`), once an operator."""
        self.phases: list[tuple[int, str]] = [(0, FORWARD)]
        """(time, phase that begins there): forward or backward."""
        self.at_failure: list[Storage] = []
        """What lived when an operator ran out of memory."""
        self._device, self._rounding, self._stacks = device, rounding, stacks
        self._clock = 0
        self._logits_width, self._logits_numel = logits_width, logits_numel
        self._expand, self._on_call = expand or {}, on_call
        self._current: dict[int, tuple[weakref.ref[torch.UntypedStorage], Storage]] = {}
        self._resizes: list[Any] = []

    def __enter__(self) -> MemoryTimeline:
        timeline, original = self, torch.UntypedStorage.resize_
        self._resizes.append(original)  # entered again inside of itself, to look into an operator
        if len(self._resizes) == 1:

            def resize(storage: torch.UntypedStorage, size: int) -> Any:
                result = original(storage, size)
                timeline._resized(storage)
                return result

            torch.UntypedStorage.resize_ = resize  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resizes.pop()  # type: ignore[method-assign]
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # comes back as operators on what it wraps
        if func in self._expand:
            with self:
                return self._expand[func](*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1  # a value read on the host: anything finite
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.at_failure = self.alive()
            raise
        self._tick()
        for tensor in _plain_tensors(result):
            self._add(tensor, None, (args, kwargs))
        self._label_by_operator(func, args, kwargs, result)
        if self._on_call is not None:
            self._on_call(func, args, kwargs, result)
        return result

    @property
    def clock(self) -> int:
        """Operators and deaths so far."""
        return self._clock

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are for, also looking back. Unknown ones count from now on."""
        for tensor in _plain_tensors(list(tensors)):
            self._add(tensor, category)
            known = self._current.get(_key(tensor.untyped_storage()))
            if known is not None:
                known[1].category = category

    def start(self) -> None:
        """Forget what is gone: the step begins here."""
        self.began = self._clock
        self.storages = [s for _, s in self._current.values()]
        self.phases = [(self._clock, FORWARD)]
        self.seconds = [(self._clock, time.perf_counter())]

    def alive(self) -> list[Storage]:
        """What lives now."""
        return [s for _, s in self._current.values() if s.num_bytes]

    def at_present(self, since: int = 0) -> dict[str, int]:
        """Bytes of each category that live now and were made after `since`, a value of `clock`."""
        sizes: Counter[str] = Counter()
        for storage in self.alive():
            if storage.birth > since:
                sizes[storage.category] += storage.num_bytes
        return {category: sizes[category] for category in CATEGORIES}

    def _tick(self) -> None:
        self._clock += 1
        self.seconds.append((self._clock, time.perf_counter()))
        phase = _phase()
        if phase != self.phases[-1][1]:
            self.phases.append((self._clock, phase))

    def _add(self, tensor: Tensor, category: str | None, arguments: Any = None) -> None:
        """Note a tensor; without a category, the result of an operator with these arguments."""
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        known = self._current.get(_key(storage))
        if known is not None and known[0]() is storage:
            return
        if category is None:
            category = ACTIVATIONS if _phase() == FORWARD else TEMPORARY
            if self._are_logits(tensor):
                category = LOGITS
            if any(t.device.type == self._device and t.untyped_storage() is storage for t in _plain_tensors(arguments)):
                category = OTHER  # of before the step, or of inside an operator, and seen first when it is viewed
        self._begin(storage, category)

    def _are_logits(self, tensor: Tensor) -> bool:
        numel = self._logits_numel or tensor.numel()
        return tensor.dim() > 1 and tensor.shape[-1] == self._logits_width and tensor.numel() == numel

    def _begin(self, storage: torch.UntypedStorage, category: str) -> None:
        key = _key(storage)
        size = -(-storage.nbytes() // self._rounding) * self._rounding
        stack = _stack() if self._stacks and size >= _STACK_FROM else ()
        entry = Storage(category, size, self._clock, stack=stack)
        self.storages.append(entry)
        self._current[key] = (weakref.ref(storage, lambda ref: self._died(key, ref)), entry)

    def _died(self, key: int, ref: Any) -> None:
        known = self._current.get(key)
        if known is not None and known[0] is ref:
            self._end(known[1])
            del self._current[key]

    def _end(self, entry: Storage) -> None:
        self._clock += 1  # so that what is made next does not share a moment with it
        entry.death = self._clock

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type not in (self._device, "meta"):
            return
        known = self._current.get(_key(storage))
        if known is None:  # older than this, and FSDP alone resizes
            self._clock += 1
            self._begin(storage, GATHERED)
        elif known[1].num_bytes != storage.nbytes():
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
        elif name == "_to_copy" and self._category(args[0]) in (WEIGHTS, GATHERED):
            self.label([result], CAST)

    def _category(self, tensor: Tensor) -> str | None:
        known = self._current.get(_key(tensor.untyped_storage()))
        return None if known is None else known[1].category


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata


def _phase() -> str:
    return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD


def _plain_tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaf = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            yield leaf.elem if isinstance(leaf, AsyncCollectiveTensor) else leaf


def _stack(depth: int = 6) -> tuple[str, ...]:
    """Lines of Python that run, innermost first, without torch's; in a backward first the name of its node."""
    node = torch._C._current_autograd_node() if _phase() == BACKWARD else None
    lines = [] if node is None else [f"backward of {node.name()}"]
    frame = sys._getframe(1)
    while frame is not None and len(lines) < depth:
        code = frame.f_code
        if not code.co_filename.startswith(_SKIPPED):
            lines.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(lines)
