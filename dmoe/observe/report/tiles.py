"""Heat maps as small images inside the page: PNG files of one byte a cell with a palette, which no library draws.

The middle of the palette is transparent, so a balanced cell has the colour of the page in a light and in a dark theme.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LEVELS = 25  # colours of a palette: steps that the eye can tell apart, and few enough to be packed well
_UNKNOWN = LEVELS  # the index of a cell whose value is not known
_BLUE, _ORANGE = (41, 107, 235), (230, 102, 10)


@dataclass(frozen=True)
class Scale:
    """Colours for values from `low` to `high`: to both sides of the middle (`diverging`), or from nothing to full."""

    low: float
    high: float
    diverging: bool = False

    def levels(self, values: Array) -> Array:
        """Palette indices, uint8, of `values` (any shape); values beyond the ends get the colour of the end."""
        span = max(self.high - self.low, 1e-12)
        place = np.clip((np.nan_to_num(values, nan=self.low) - self.low) / span, 0, 1)
        return np.where(np.isnan(values), _UNKNOWN, np.rint(place * (LEVELS - 1))).astype(np.uint8)

    def palette(self) -> tuple[bytes, bytes]:
        """Red, green and blue of each colour, and how opaque each is."""
        place = np.linspace(-1, 1, LEVELS) if self.diverging else np.linspace(0, 1, LEVELS)
        colors = [_ORANGE if p > 0 else _BLUE for p in place] if self.diverging else [_BLUE] * LEVELS
        opaque = np.abs(place) ** 0.8 * 255
        rgb = bytes(np.array([*colors, (128, 128, 128)], dtype=np.uint8))
        return rgb, bytes(np.array([*np.rint(opaque), 110], dtype=np.uint8))

    @property
    def legend(self) -> str:
        """The image of the scale, from `low` to `high`."""
        return data_uri(png(np.arange(LEVELS, dtype=np.uint8)[None, :], self))


def png(cells: Array, scale: Scale) -> bytes:
    """A PNG file, one pixel a cell, of palette indices `cells`, uint8 [rows, columns]. Format: ISO/IEC 15948."""
    rows, columns = cells.shape
    rgb, opaque = scale.palette()
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # each line starts with its filter, 0: none
    lines[:, 1:] = cells
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", rgb),
        _chunk(b"tRNS", opaque),
        _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
        _chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def tile(values: Array, scale: Scale) -> str:
    """The image of `values` [rows, columns] as an address for an <img>."""
    return data_uri(png(scale.levels(values), scale))
