"""Reading torch.save files of others without running what is pickled in them.

Trainers pickle their command line (an argparse.Namespace, with enums, paths and classes of their own in it), random
states and optimisers beside the weights. torch's weights_only loader refuses unknown classes. Here each is read as an
`Opaque` object, which does nothing, so that weights and plain settings can be had from any such file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dmoe.errors import RunError

_NAMESPACE = "argparse.Namespace"


class Opaque:
    """Stands for an object whose class is not loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def load(file: Path | io.BytesIO, where: str = "") -> Any:
    """What torch.save wrote. Tensors of a path are mapped, not read: they come from the disk when they are used.

    Raises RunError, naming the file (`where`, for one in memory), if it is damaged or not a zip file as torch has
    written since 1.6.
    """
    where = where or str(file)
    mapped = isinstance(file, Path)
    try:
        with _no_safe_globals():
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
            known = [(Opaque, name) for name in sorted(unknown - {_NAMESPACE})]
            if not mapped:
                file.seek(0)  # type: ignore[union-attr]
            with torch.serialization.safe_globals([(argparse.Namespace, _NAMESPACE), *known]):
                return torch.load(file, map_location="cpu", mmap=mapped or None, weights_only=True)
    except OSError as error:
        raise RunError(f"{where}: cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged archives and pickles raise nearly anything
        if "Expected input to be a checkpoint" in str(error):
            raise RunError(f"{where}: is not a zip file of torch.save (written since torch 1.6)") from None
        message = " ".join(str(error).split())
        raise RunError(f"{where}: cannot be read: {type(error).__name__}: {message[:300]}") from error


@contextlib.contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Without the classes that other packages told torch are safe (Megatron-core some of numpy's), which would build an
    object around one of ours."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(others)


def plain(namespace: Any) -> dict[str, Any]:
    """Fields of a Namespace or dict that are plain values; those of unknown classes are left out."""
    fields = vars(namespace) if isinstance(namespace, argparse.Namespace) else namespace
    return {name: value for name, value in fields.items() if not isinstance(value, Opaque)}
