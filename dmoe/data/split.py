"""What is held out for validation, and where long text may be cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# A line end between two characters that are not white space. Byte-level BPE patterns (GPT-2's, cl100k's and ours)
# never make a token across it, so cutting there gives the same tokens.
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)")


def held_out_documents(digests: Sequence[bytes], val_fraction: float) -> list[bool]:
    """Which documents are held out: those whose sha256, as a fraction of its range, is below `val_fraction`.

    The choice for one document does not depend on the others, on their order or on a seed, so adding documents to a
    corpus moves none of the old ones to the other side. Only if a side would be empty, the document whose hash is
    nearest to it moves there. `digests`: two or more, all different.
    """
    values = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    held_out = [value < val_fraction for value in values]
    if not any(held_out):
        held_out[values.index(min(values))] = True
    elif all(held_out):
        held_out[values.index(max(values))] = False
    return held_out


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """Cut one text into a part for training and one for validation, `val_fraction` at its end.

    The cut is at the first line end after that point, else the last one before it if that at most doubles the
    validation part, else at the very character. `text`: two or more characters; neither part is empty.
    """
    wanted = min(max(int(len(text) * (1 - val_fraction)), 1), len(text) - 1)
    cut = text.find("\n", wanted - 1) + 1
    if cut in (0, len(text)):
        cut = text.rfind("\n", 0, wanted) + 1
        if cut == 0 or len(text) - cut > 2 * (len(text) - wanted):
            cut = wanted
    return text[:cut], text[cut:]


def split_long(text: str, length: int) -> Iterator[str]:
    """`text` in pieces of at least `length` characters, cut at safe line ends; text without them stays whole."""
    start = 0
    while match := _SAFE_CUT.search(text, start + length):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]
