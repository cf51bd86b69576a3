"""Text to token ids and back: raw bytes, a byte-level BPE trained here, or any byte-exact tokenizer.json."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")  # noqa: RUF001 (DeepSeek's)

# What a BPE token may not reach across. Chosen by bytes per token on held-out Python source: a newline, the
# punctuation before it and the indentation after it are one piece, so "):\n        " can be one token.
BPE_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the one character before it: " the", "_name", "(self"
        r"\p{N}{1,3}",  # at most three digits
        r" ?[^\s\p{L}\p{N}]+(?:[ \t]*[\r\n]+[ \t]*)*",  # punctuation, with the line end and indentation after it
        r"\s*[\r\n]+[ \t]*",  # line ends with the indentation after them
        r"\s+(?!\S)",  # spaces, leaving the last one to the word that follows
        r"\s+",
    ]
)


class Tokenizer(ABC):
    """Text to token ids and back, without loss: `decode(encode(text)) == text`.

    Special tokens are never made from text (the characters "<|endoftext|>" in a document are ordinary characters) and
    `decode` leaves them out, and ids that stand for nothing (a model may have more rows than the tokeniser) too.
    """

    vocab_size: int
    """Largest id + 1."""
    eos_id: int
    """The end-of-document mark."""
    pieces_join: bool
    """Ids of text encoded in pieces, put together, decode to the whole text. Not so if a space is put before each."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for: int32 [vocab_size]; 0 for special tokens and unused ids.

        Over the ids of a text they add up to the bytes of the text; one more for a tokenizer.json that puts a space
        before every text.
        """

    @abstractmethod
    def to_json(self) -> str:
        """The text that `save` writes and `load_tokenizer` reads."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokeniser to the file `path`, at once and whole."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)


class ByteTokenizer(Tokenizer):
    """One token a byte: ids 0 to 255, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    pieces_join = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int32)
        lengths[self.eos_id] = 0
        return lengths

    def to_json(self) -> str:
        return json.dumps({"dmoe_tokenizer": "bytes"}) + "\n"


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library: byte-level (GPT-2's alphabet) or SentencePiece-style (Llama's).

    Args:
        content: text of the tokenizer.json.
        name: how messages call it.

    Raises:
        ConfigError: not a tokenizer.json, of another style, or without a known end-of-document token.
    """

    def __init__(self, content: str, name: str = "trained BPE") -> None:
        from tokenizers import Tokenizer as Backend

        try:
            spec = json.loads(content)
            self._backend = Backend.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"data.tokenizer is {name!r}: must be a valid tokenizer.json: {error}") from None
        self._byte_level = "ByteLevel" in _types(spec.get("decoder")) | _types(spec.get("pre_tokenizer"))
        if not self._byte_level and not _is_sentencepiece(spec):
            raise ConfigError(
                f"data.tokenizer is {name!r}: must be byte-level (GPT-2 style) or SentencePiece-style; "
                f"{spec['model'].get('type')} with this decoder does not keep text exactly"
            )
        # Training data is cut by the sampler, not here, and a document may contain the text of a special token.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.pieces_join = self._byte_level and not _adds_prefix_space(spec)
        eos = next((token for token in EOS_NAMES if token in vocab), None)
        if eos is None:
            raise ConfigError(
                f"data.tokenizer is {name!r}: must have an end-of-document token, one of {', '.join(EOS_NAMES)}"
            )
        self.eos_id = vocab[eos]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._backend.get_added_tokens_decoder()
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(added[i].content.encode())
            elif self._byte_level:
                lengths[i] = _byte_level_length(token)
            else:
                lengths[i] = _sentencepiece_length(token)
        lengths[self.eos_id] = 0
        return lengths

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE on `texts`: the end mark (id 0), the 256 bytes, and merges seen at least twice.

    The same texts in the same order give the same tokeniser. `vocab_size` counts all of it; a small corpus gives fewer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer(backend.to_str())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokeniser that `Tokenizer.save` wrote, or any supported tokenizer.json; a folder means the one in it.

    Raises:
        ConfigError: missing, unreadable or not supported; names the path.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'data.tokenizer is {str(path)!r}: must be "bpe", "bytes" or the path of a tokenizer.json ({error})'
        ) from None
    try:
        if json.loads(content) == {"dmoe_tokenizer": "bytes"}:
            return ByteTokenizer()
    except ValueError:
        pass  # JsonTokenizer says what is wrong
    return JsonTokenizer(content, str(path))


def _parts(component: Any) -> list[dict[str, Any]]:
    """The members of a normaliser, pre-tokeniser or decoder of a tokenizer.json, "Sequence"s opened."""
    if not isinstance(component, dict):
        return []
    members = component.get("normalizers", component.get("pretokenizers", component.get("decoders")))
    return [component] if members is None else [part for member in members for part in _parts(member)]


def _types(component: Any) -> set[str]:
    return {part.get("type", "") for part in _parts(component)}


def _adds_prefix_space(spec: dict[str, Any]) -> bool:
    return any(part.get("add_prefix_space") for part in _parts(spec.get("pre_tokenizer")))


def _is_sentencepiece(spec: dict[str, Any]) -> bool:
    """Spaces are written "▁": by Metaspace, or by replacements in normaliser and decoder."""
    if "Metaspace" in _types(spec.get("pre_tokenizer")):
        return True
    return any(part.get("type") == "Replace" and part.get("content") == "▁" for part in _parts(spec.get("normalizer")))


def _byte_alphabet() -> set[str]:
    """GPT-2's 256 characters, each of which stands for one byte: printable Latin-1, and U+0100 upwards for the rest."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(i) for i in printable} | {chr(0x100 + i) for i in range(256 - len(printable))}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_length(token: str) -> int:
    return sum(1 if char in _BYTE_ALPHABET else len(char.encode()) for char in token)


def _sentencepiece_length(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1  # a single byte, for characters that are not in the vocabulary
    return len(token.replace("▁", " ").encode())
