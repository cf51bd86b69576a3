"""The packed token file: a folder with all documents of one split as one memory-mapped array.

tokens.bin       the documents' tokens, each followed by the end mark; uint16, or uint32 for vocabularies > 65536
doc_starts.npy   int64 [documents + 1]: where each document begins, and the number of tokens
meta.json        sizes, dtype, end mark, sha256 of tokens.bin, format version
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from dmoe.errors import RunError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenMeta:
    """The contents of meta.json."""

    format_version: int
    dtype: str
    """"uint16" or "uint32", little-endian in the file."""
    num_tokens: int
    """Tokens in tokens.bin, end marks included."""
    num_documents: int
    text_bytes: int
    """Bytes of UTF-8 text that the tokens stand for; end marks count nothing."""
    vocab_size: int
    eos_id: int
    sha256: str
    """Of tokens.bin, hexadecimal."""


def _file_dtype(name: str) -> np.dtype[np.unsignedinteger]:
    if name not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {name!r}: must be 'uint16' or 'uint32'")
    return np.dtype(name).newbyteorder("<")


class TokenWriter:
    """Streams documents into a token folder. As a context manager it finishes the files unless the block raised.

    meta.json appears last, under its final name only when whole: a folder without it was never finished.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_id: int) -> None:
        self.folder, self.vocab_size, self.eos_id = folder, vocab_size, eos_id
        self.dtype_name = "uint16" if vocab_size <= 65536 else "uint32"
        self._dtype = _file_dtype(self.dtype_name)
        self._num_tokens = self._text_bytes = 0
        self._doc_starts = [0]
        self._hash = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "tokens.bin.tmp").open("wb")

    def extend(self, ids: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append tokens to the current document; they stand for `text_bytes` bytes of UTF-8.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            raise ValueError(f"token ids span [{values.min()}, {values.max()}]: must be in [0, {self.vocab_size})")
        data = values.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._text_bytes += text_bytes
        self._num_tokens += values.size

    def end_document(self) -> None:
        """Append the end mark; what follows is another document."""
        self.extend([self.eos_id], 0)
        self._doc_starts.append(self._num_tokens)

    def finish(self) -> TokenMeta:
        """Write out everything and give the files their names."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        meta = TokenMeta(
            format_version=FORMAT_VERSION,
            dtype=self.dtype_name,
            num_tokens=self._num_tokens,
            num_documents=len(self._doc_starts) - 1,
            text_bytes=self._text_bytes,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            sha256=self._hash.hexdigest(),
        )
        with (self.folder / "doc_starts.npy.tmp").open("wb") as file:
            np.save(file, np.array(self._doc_starts, dtype=np.int64))
        (self.folder / "meta.json.tmp").write_text(json.dumps(asdict(meta), indent=2) + "\n")
        for name in ("tokens.bin", "doc_starts.npy", "meta.json"):
            os.replace(self.folder / f"{name}.tmp", self.folder / name)
        return meta

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._file.close()


@dataclass(frozen=True)
class TokenFile:
    """An opened token folder.

    Attributes:
        tokens: read-only memory map, uint16 or uint32 [num_tokens].
        doc_starts: int64 [num_documents + 1]; document d, end mark included, is tokens[doc_starts[d]:doc_starts[d+1]].
        meta: the contents of meta.json.
        folder: where the files lie.
    """

    tokens: np.ndarray
    doc_starts: np.ndarray
    meta: TokenMeta
    folder: Path

    def __len__(self) -> int:
        return self.meta.num_tokens

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenFile:
        """Memory-map the folder and check all sizes against meta.json (not the sha256: see `verify`).

        Raises:
            RunError: a file is missing, damaged or of the wrong size; names the file.
        """
        folder = Path(folder)
        meta = _read_meta(folder / "meta.json")
        dtype = _file_dtype(meta.dtype)
        path, expected = folder / "tokens.bin", meta.num_tokens * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise RunError(f"cannot open token file {path}: {error.strerror}") from None
        if size != expected:
            raise RunError(f"token file {path} has {size} bytes, but its meta.json says {expected}: it is damaged")
        tokens = np.memmap(path, dtype=dtype, mode="r", shape=(meta.num_tokens,))
        return cls(tokens, _read_doc_starts(folder / "doc_starts.npy", meta), meta, folder)

    def verify(self) -> None:
        """Read all of tokens.bin and compare its sha256 with meta.json.

        Raises:
            RunError: they differ.
        """
        digest = hashlib.sha256()
        step = 1 << 22
        for start in range(0, len(self.tokens), step):
            digest.update(self.tokens[start : start + step].tobytes())
        if digest.hexdigest() != self.meta.sha256:
            raise RunError(f"token file {self.folder / 'tokens.bin'} does not match the sha256 in its meta.json")


def _read_meta(path: Path) -> TokenMeta:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"cannot open token file {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"token file {path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise RunError(f"token file {path} has another format: must be format_version {FORMAT_VERSION}")
    try:
        meta = TokenMeta(**content)
        _file_dtype(meta.dtype)
        if meta.num_documents < 1 or meta.num_tokens < meta.num_documents:
            raise ValueError(f"{meta.num_tokens} tokens in {meta.num_documents} documents")
    except (TypeError, ValueError) as error:
        raise RunError(f"token file {path} is damaged: {error}") from None
    return meta


def _read_doc_starts(path: Path, meta: TokenMeta) -> np.ndarray:
    try:
        doc_starts = np.load(path, allow_pickle=False)
    except OSError as error:
        raise RunError(f"cannot open token file {path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise RunError(f"token file {path} is damaged: {error}") from None
    if doc_starts.shape != (meta.num_documents + 1,) or doc_starts[-1] != meta.num_tokens:
        raise RunError(f"token file {path} does not match its meta.json: it is damaged")
    return doc_starts
