"""Models in the files of other tools, both ways, exact and streaming.

    source = open_source("Mixtral-8x7B-v0.1")          any format; source.config, source.read(name, expert)
    convert("Mixtral-8x7B-v0.1", "run", "dmoe")        and back: convert("run", "copy", "hf")
    load_into(model, "Mixtral-8x7B-v0.1")              whole, or this rank's part

A format is a list of `mapping.Stored`: each stored tensor is made of views of ours. `mapped` uses the list in both
directions; `families/` has a file for each family of Hugging Face models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmoe.checkpoint.formats.conversion import convert
    from dmoe.checkpoint.formats.extra_files import tokenizer_file
    from dmoe.checkpoint.formats.load import from_pretrained, load_into
    from dmoe.checkpoint.formats.mapped import MappedSource, stored_outlines, write_mapped
    from dmoe.checkpoint.formats.safetensors_read import SafetensorsStore
    from dmoe.checkpoint.formats.safetensors_write import Outline, SafetensorsSink
    from dmoe.checkpoint.formats.source import kind_of, open_source, read_config

_HOMES = {
    "convert": "conversion",
    "tokenizer_file": "extra_files",
    "from_pretrained": "load",
    "load_into": "load",
    "MappedSource": "mapped",
    "stored_outlines": "mapped",
    "write_mapped": "mapped",
    "SafetensorsStore": "safetensors_read",
    "Outline": "safetensors_write",
    "SafetensorsSink": "safetensors_write",
    "kind_of": "source",
    "open_source": "source",
    "read_config": "source",
}

__all__ = [
    "MappedSource",
    "Outline",
    "SafetensorsSink",
    "SafetensorsStore",
    "convert",
    "from_pretrained",
    "kind_of",
    "load_into",
    "open_source",
    "read_config",
    "stored_outlines",
    "tokenizer_file",
    "write_mapped",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
