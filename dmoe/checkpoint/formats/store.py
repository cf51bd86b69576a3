"""Where tensors are read from and written to, whatever the format: the two interfaces that formats implement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dmoe.config import ModelConfig


class TensorStore(Protocol):
    """Named tensors in files. Reading one holds no other in memory."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one row of its dim 0, as a new CPU tensor of the stored dtype.

        Raises:
            RunError: the file is damaged; names it and the tensor.
        """
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...


class Source(Protocol):
    """A model whose parameters and buffers can be read one at a time under our names."""

    config: ModelConfig

    def names(self) -> Iterable[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Our parameter, or the row of one expert, as a CPU tensor of the stored dtype."""
        ...


class TensorSink(Protocol):
    """Takes tensors one by one. Nothing appears at the destination before `close`."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def close(self) -> None: ...
