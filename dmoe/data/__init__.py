"""Corpora, tokenisers, packed memory-mapped token files, and samplers that are pure functions of (seed, step)."""

from dmoe.data.corpus import CorpusStats, Document, read_corpus
from dmoe.data.prepare import Dataset, prepare
from dmoe.data.sampler import WindowSampler, gather_windows, sequential_windows
from dmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe
from dmoe.data.tokens import TokenFile, TokenMeta, TokenWriter

__all__ = [
    "ByteTokenizer",
    "CorpusStats",
    "Dataset",
    "Document",
    "JsonTokenizer",
    "TokenFile",
    "TokenMeta",
    "TokenWriter",
    "Tokenizer",
    "WindowSampler",
    "gather_windows",
    "load_tokenizer",
    "prepare",
    "read_corpus",
    "sequential_windows",
    "train_bpe",
]
