"""What makes Triton's interpreter slow, done once instead of each time, or not at all where nobody looks at it.

For every call of a function inside a kernel it replaces the functions of `triton.language` again; it compares types by
building a table of all of them; and after each integer sum and product it computes with a dozen interpreted operations
whether they overflowed, for an assertion that is off but in its debug mode. Together that is 3/5 of the time of a
kernel.

These are private names of Triton: where one of them is missing, the interpreter stays as slow as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process."""
    for owner, name, faster in (
        (interpreter, "_get_np_dtype", _looked_up_once),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _only_in_debug_mode),
    ):
        if hasattr(owner, name):
            setattr(owner, name, faster(getattr(owner, name)))
    if all(hasattr(interpreter, name) for name in ("GridExecutor", "_LangPatchScope", "_patch_lang")):
        _replace_once_a_launch()


def _replace_once_a_launch() -> None:
    """What a launch replaces it also restores, so that the first call of each module's functions has to come again."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[int]] = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)

    def replace_once(fn: Any) -> Any:
        if languages(fn) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(languages(fn))
        return replace(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew


def _looked_up_once(slow: Callable[[Any], Any]) -> Callable[[Any], Any]:
    once = functools.cache(slow)

    def look_up(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        return once(kind) if type(kind) is tl.dtype else slow(kind)  # those of pointers have no hash

    return look_up


def _only_in_debug_mode(check: Callable[..., None]) -> Callable[..., None]:
    def check_if_asked(semantic: Any, *args: Any) -> None:
        if semantic.builder.options.debug:
            check(semantic, *args)

    return check_if_asked
