"""Which parameters or modules a pattern of the configuration means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

_WORDS = {"attention": "self_attn"}


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the dotted `name` or whole parts of it, one or several in a row: "experts", "layers.0",
    "layers.*.self_attn". * stands for anything, dots too. "attention" is another word for "self_attn"."""
    pattern = _WORDS.get(pattern, pattern)
    return fnmatchcase(name, pattern) or fnmatchcase(f".{name}.", f"*.{pattern}.*")


def nearest_names(pattern: str, names: Iterable[str]) -> str:
    """The names, or parts of names, that are most like `pattern`, for an error message."""
    names = list(names)
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    candidates = names if "." in pattern else [*_WORDS, *parts]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
    return ", ".join(near)
