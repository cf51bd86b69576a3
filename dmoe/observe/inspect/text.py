"""Tokens and pieces of text for people: spaces and line ends can be seen, and nothing is lost at the seams."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dmoe.observe.routing.summary import Array

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", " ": "\u2423"}
_BROKEN = "\ufffd"


class Snippet(NamedTuple):
    """A token in its text; line ends are shown as an arrow."""

    before: str
    token: str
    after: str


class TokenText:
    """What token ids look like.

    Args:
        decode: text of ids; special tokens give none.
        encode: ids of a text.
        names: of ids that are no text, such as the end of a document.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], Sequence[int]],
        names: Mapping[int, str] | None = None,
    ) -> None:
        self._decode, self._names = decode, dict(names or {})
        # Some decoders drop the space before the first word: what comes after an anchor keeps its own.
        self._anchor = list(encode("a"))
        self._anchor_text = decode(self._anchor)
        self._known: dict[int, str] = {}

    def show(self, token: int) -> str:
        """One token: an open box for a space, an escape for a line end, a number for what is no whole character."""
        if token not in self._known:
            self._known[token] = self._names.get(token) or self._shown(token)
        return self._known[token]

    def _shown(self, token: int) -> str:
        text = self.text([token])
        return f"\u27e8{token}\u27e9" if not text.strip(_BROKEN) else visible(text)

    def text(self, ids: Sequence[int] | Array) -> str:
        """The text of consecutive ids from the middle of a text."""
        numbers = [int(i) for i in ids]
        whole = self._decode([*self._anchor, *numbers])
        return whole[len(self._anchor_text) :] if whole.startswith(self._anchor_text) else self._decode(numbers)

    def snippet(self, ids: Sequence[int] | Array, position: int, around: int = 8) -> Snippet:
        """The token at `position` with the `around` tokens to both sides of it."""
        before = self.text(ids[max(0, position - around) : position])
        after = self.text(ids[position + 1 : position + 1 + around])
        return Snippet(_one_line(before), self.show(int(ids[position])), _one_line(after))


def visible(text: str) -> str:
    """`text` with every space shown, and escapes for what does not print."""
    return "".join(_ESCAPES.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _one_line(text: str) -> str:
    text = re.sub(r"[ \t]*\n[ \t]*", " \u21b5 ", text)
    return "".join(c if c.isprintable() else " " for c in text)
