"""Reading a corpus: one `Document` after another, in an order that depends only on the corpus.

`data.corpus` names one of: "stdlib" (the running Python's own library source; write "./stdlib" for a folder of that
name), a text file, a folder, a glob, or a .jsonl file. A file is one document, except that a .jsonl file, also inside
a folder or a glob, holds one document a line. Text is kept byte for byte: no newline translation, no normalisation.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dmoe.config import DataConfig
from dmoe.errors import ConfigError

STDLIB_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# A NUL byte this early in a file found by walking a folder marks it as binary (git uses the same rule and length).
BINARY_PROBE_BYTES = 8000


@dataclass(frozen=True)
class Document:
    """One text with its name (a path relative to the corpus, ":LINE" appended in .jsonl) and sha256 of its UTF-8."""

    name: str
    text: str
    num_bytes: int
    digest: bytes


@dataclass
class CorpusStats:
    """What an iteration over a corpus kept and left out."""

    documents: int = 0
    num_bytes: int = 0
    not_text: int = 0
    """Files of a folder or glob that are binary or not UTF-8."""
    empty: int = 0
    duplicates: int = 0
    """Documents whose text is exactly that of an earlier one."""

    def note(self) -> str:
        """The left-out documents in words, "" if there are none."""
        counts = [
            (self.not_text, "not UTF-8 text"),
            (self.empty, "empty"),
            (self.duplicates, "exact duplicates"),
        ]
        return ", ".join(f"{n} {what}" for n, what in counts if n)


def read_corpus(config: DataConfig, stats: CorpusStats | None = None) -> Iterator[Document]:
    """Iterate over the documents of `config.corpus`, counting into `stats`.

    Empty documents are dropped and exact duplicates are kept once, so that held-out text is not in the training set.
    Memory: one document at a time and 32 bytes for every document seen.

    Raises:
        ConfigError: the corpus is missing, unreadable or holds no text; a named file is not UTF-8; a .jsonl line is
            not an object with the text under `config.text_field`.
    """
    stats = CorpusStats() if stats is None else stats
    seen: set[bytes] = set()
    for name, text in _read_texts(config, stats):
        if not text:
            stats.empty += 1
            continue
        raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest in seen:
            stats.duplicates += 1
            continue
        seen.add(digest)
        stats.documents += 1
        stats.num_bytes += len(raw)
        yield Document(name, text, len(raw), digest)
    if not stats.documents:
        note = stats.note()
        _fail(config, "a corpus with at least one document" + (f" (left out: {note})" if note else ""))


def _fail(config: DataConfig, wanted: str) -> NoReturn:
    raise ConfigError(f"data.corpus is {config.corpus!r}: must be {wanted}")


def _read_texts(config: DataConfig, stats: CorpusStats) -> Iterator[tuple[str, str]]:
    """(name, text) of everything in the corpus, duplicates and empty texts included."""
    root, paths, named = _find_files(config)
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            if path.suffix == ".jsonl":
                yield from _read_jsonl(path, name, config)
                continue
            raw = path.read_bytes()
        except OSError as error:
            _fail(config, f"readable, but {path} is not: {error.strerror}")
        if not named and b"\0" in raw[:BINARY_PROBE_BYTES]:
            stats.not_text += 1
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if named:
                _fail(config, f"UTF-8 text, but byte {error.start} does not decode")
            stats.not_text += 1
            continue
        yield name, text


def _find_files(config: DataConfig) -> tuple[Path, list[Path], bool]:
    """Folder that names are relative to, files in order, and whether the one file was named by the user."""
    if config.corpus == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, config, STDLIB_SKIPPED_DIRS) if path.suffix == ".py"]
        if not files:
            _fail(config, f"a path: this Python keeps no library source in {root}")
        return root, files, False
    path = Path(config.corpus).expanduser()
    if path.is_dir():
        return path, _walk(path, config, frozenset()), False
    if path.is_file():
        return path.parent, [path], True
    if path.exists():
        _fail(config, "a regular file or a folder (a pipe or device cannot be read twice)")
    if not glob.has_magic(str(path)):
        _fail(config, '"stdlib" or the path of an existing file or folder, or a glob')
    files = sorted((p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()), key=Path.as_posix)
    if not files:
        _fail(config, "a glob that matches at least one file")
    return Path(os.path.commonpath([p.parent for p in files])), files, False


def _walk(root: Path, config: DataConfig, skipped_dirs: frozenset[str]) -> list[Path]:
    """Regular files under `root`, sorted by relative path; hidden files and folders are left out."""

    def unreadable(error: OSError) -> NoReturn:
        _fail(config, f"readable, but {error.filename} is not: {error.strerror}")

    files = []
    for folder, dirs, names in os.walk(root, onerror=unreadable):
        dirs[:] = [d for d in dirs if not d.startswith(".") and d not in skipped_dirs]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in files if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _read_jsonl(path: Path, name: str, config: DataConfig) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name}:{number}", _text_of_line(line, path, number, config)


def _text_of_line(line: bytes, path: Path, number: int, config: DataConfig) -> str:
    """The text of one .jsonl line; errors name the file, the line and the field."""
    where, field = f"data.corpus is {config.corpus!r}: {path}, line {number}", config.text_field
    try:
        # The first line may carry a byte order mark. json.loads(bytes) would guess other encodings.
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: must be one JSON object in UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: must be a JSON object, not {type(record).__name__}")
    if field not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ConfigError(f"{where}: has no field {field!r} (data.text_field); its fields: {keys}")
    text = record[field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: field {field!r} must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: field {field!r} must be valid Unicode, but has a lone surrogate") from None
    return text
