"""From a `DataConfig` to a tokeniser and two packed token files, built once and cached by content."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from dmoe.config import DataConfig
from dmoe.data.cache import open_cache_dir, publish, temporary_folder
from dmoe.data.corpus import CorpusStats, read_corpus
from dmoe.data.progress import say, stage
from dmoe.data.split import held_out_documents, split_long, split_text
from dmoe.data.tokenizer import BPE_PATTERN, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from dmoe.data.tokens import FORMAT_VERSION, TokenFile, TokenWriter
from dmoe.errors import ConfigError, RunError

# The tokenisers library keeps a few hundred bytes for each token of a batch: 4 MiB of text takes a few 100 MB.
BATCH_CHARS = 1 << 22
PIECE_CHARS = 1 << 18


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus.

    Attributes:
        train, val: the packed tokens of both sides.
        tokenizer: what made them.
        val_text_bytes: bytes of held-out text, for bits per byte.
        zlib_bits_per_byte: the held-out text under zlib level 9, a figure that a trained model should beat.
        folder: the cache entry; `folder / "tokenizer.json"` is the tokeniser.
    """

    train: TokenFile
    val: TokenFile
    tokenizer: Tokenizer
    val_text_bytes: int
    zlib_bits_per_byte: float
    folder: Path


@dataclass(frozen=True)
class _Scan:
    """What a first reading of the corpus finds out."""

    key: str
    digests: list[bytes]
    num_bytes: int


def prepare(config: DataConfig, *, progress: bool = True) -> Dataset:
    """Read `config.corpus`, train or load the tokeniser, encode, and open the result.

    The split is by document: a hash of a document's text decides, so it depends on no seed and no order. If that
    leaves a side empty, one document moves. A corpus of one document is cut in two near its end, at a line end where
    there is one. The BPE is trained on the training side alone.

    The result is cached in `config.cache_dir` under a hash of the documents and of all settings that matter; a damaged
    entry is built again. Processes may call this at the same time; each then builds on its own and one result stays, so
    in a distributed run let one process a host go first. `progress` reports on stderr.

    Limits: every call reads the whole corpus once to hash it, and a build reads it two or three times. One document has
    to fit in memory a few times over, as do the distinct words of the training text while a BPE is trained; for the
    rest memory is bounded, at about 100 bytes a document.

    Raises:
        ConfigError: corpus, tokeniser or cache folder cannot be used; names the field.
        RunError: writing failed, or the corpus changed while it was read.
    """
    tokenizer = _named_tokenizer(config)
    cache = open_cache_dir(config.cache_dir)
    scan = _scan(config, tokenizer, progress)
    entry = cache / scan.key
    try:
        if entry.exists():
            try:
                return _open_entry(entry)
            except RunError as error:
                say(f"building {entry} again: {error}", progress)
        with temporary_folder(cache, scan.key) as folder:
            _build(config, scan, tokenizer, folder, progress)
            publish(folder, entry, _is_whole)
    except OSError as error:
        raise RunError(f"cannot write the data cache {cache}: {error}") from error
    return _open_entry(entry)


def _named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokeniser, or None if it is to be trained."""
    if config.tokenizer == "bpe":
        return None
    return ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)


def _scan(config: DataConfig, tokenizer: Tokenizer | None, progress: bool) -> _Scan:
    """Hash everything the result depends on: settings, then each document's name and text, in order."""
    # Not hashed: where the corpus lies and which field held the text. The documents say all that matters of them.
    how: list[object] = ["bpe", config.vocab_size, BPE_PATTERN] if tokenizer is None else [tokenizer.to_json()]
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, config.val_fraction, how]).encode())
    stats, digests = CorpusStats(), []
    with stage(f"reading {config.corpus}", None, progress) as advance:
        for document in read_corpus(config, stats):
            name = document.name.encode(errors="surrogateescape")
            key.update(len(name).to_bytes(8, "big") + name + document.digest)
            digests.append(document.digest)
            advance(document.num_bytes)
    if stats.note():
        say(f"left out: {stats.note()}", progress)
    return _Scan(key.hexdigest()[:32], digests, stats.num_bytes)


def _split_corpus(config: DataConfig, scan: _Scan) -> Iterator[tuple[str, bool]]:
    """(text, held out?) of every document, in order."""
    held_out = held_out_documents(scan.digests, config.val_fraction) if len(scan.digests) > 1 else [False]
    for document, digest, is_val in zip_longest(read_corpus(config), scan.digests, held_out):
        if document is None or document.digest != digest:
            raise RunError(f"the corpus changed while it was read (data.corpus is {config.corpus!r}): start again")
        if len(scan.digests) > 1:
            yield document.text, is_val
            continue
        if len(document.text) < 2:
            raise ConfigError(f"data.corpus is {config.corpus!r}: must be longer than one character")
        train, val = split_text(document.text, config.val_fraction)
        yield train, False
        yield val, True


def _train_tokenizer(config: DataConfig, scan: _Scan, progress: bool) -> Tokenizer:
    with stage(f"training a BPE of {config.vocab_size} tokens", scan.num_bytes, progress) as advance:

        def training_texts() -> Iterator[str]:
            for text, is_val in _split_corpus(config, scan):
                if not is_val:
                    yield from split_long(text, PIECE_CHARS)
                advance(len(text.encode()))

        return train_bpe(training_texts(), config.vocab_size)


@dataclass(frozen=True)
class _Piece:
    text: str
    ends_document: bool
    is_val: bool


def _batches(config: DataConfig, scan: _Scan, cut: bool) -> Iterator[list[_Piece]]:
    """The corpus in lists of pieces of about BATCH_CHARS characters; documents stay whole unless `cut`."""
    batch: list[_Piece] = []
    size = 0
    for text, is_val in _split_corpus(config, scan):
        done = 0
        for piece in split_long(text, PIECE_CHARS) if cut else [text]:
            done += len(piece)
            batch.append(_Piece(piece, done == len(text), is_val))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _build(config: DataConfig, scan: _Scan, tokenizer: Tokenizer | None, folder: Path, progress: bool) -> None:
    """Write a whole entry into the empty `folder`."""
    if tokenizer is None:
        tokenizer = _train_tokenizer(config, scan, progress)
    tokenizer.save(folder / "tokenizer.json")
    compressor, compressed_bytes, val_bytes = zlib.compressobj(9), 0, 0
    with ExitStack() as stack:
        train, val = (
            stack.enter_context(TokenWriter(folder / side, tokenizer.vocab_size, tokenizer.eos_id))
            for side in ("train", "val")
        )
        advance = stack.enter_context(stage("encoding", scan.num_bytes, progress))
        for batch in _batches(config, scan, cut=tokenizer.pieces_join):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch])):
                raw = piece.text.encode()
                writer = val if piece.is_val else train
                writer.extend(ids, len(raw))
                if piece.ends_document:
                    writer.end_document()
                if piece.is_val:
                    val_bytes += len(raw)
                    compressed_bytes += len(compressor.compress(raw))
                advance(len(raw))
    compressed_bytes += len(compressor.flush())
    content = {"val_text_bytes": val_bytes, "zlib_bits_per_byte": 8 * compressed_bytes / val_bytes}
    temporary = folder / "dataset.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, folder / "dataset.json")


def _open_entry(entry: Path) -> Dataset:
    """Open a cache entry; `RunError` if anything in it is missing or damaged."""
    try:
        content = json.loads((entry / "dataset.json").read_text())
        val_text_bytes, zlib_bits = int(content["val_text_bytes"]), float(content["zlib_bits_per_byte"])
        tokenizer = load_tokenizer(entry / "tokenizer.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"data cache entry {entry} is damaged: {error}") from None
    train, val = TokenFile.open(entry / "train"), TokenFile.open(entry / "val")
    for side in (train, val):
        if (side.meta.vocab_size, side.meta.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise RunError(f"data cache entry {entry} is damaged: {side.folder} is not of its tokenizer.json")
    return Dataset(train, val, tokenizer, val_text_bytes, zlib_bits, entry)


def _is_whole(entry: Path) -> bool:
    try:
        _open_entry(entry)
    except RunError:
        return False
    return True
