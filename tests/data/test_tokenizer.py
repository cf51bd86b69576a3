"""Tokenisers: nothing is lost, byte lengths add up, special tokens are never made from text."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dmoe.data import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe
from dmoe.data.split import split_long
from dmoe.errors import ConfigError

PYTHON = "def area(self, r):\n    if r < 0:\n        raise ValueError('r')\n\n    return 3.14159 * r ** 2\n" * 3
AWKWARD = [
    "",
    " ",
    "  leading and trailing  \n",
    "tabs\t\tand\r\nCRLF\r\n\r\n\tmore",
    "nul \0 bell \a del \x7f",
    "emoji 👩‍👩‍👧‍👦 flags 🇩🇪 zalgo z̷̡͝ nfc é nfd é",
    "中文。日本語 עברית العربية \u2028\u00a0\ufeff",
    "literal <|endoftext|> and </s> and <unk> and <0x41>",
    "ĠĊÄ looks like the byte alphabet",
    PYTHON,
]


def sentencepiece_like(prefix: bool) -> str:
    """A Llama-2 style tokenizer.json: "▁" for spaces, byte fallback, BOS template, truncation and padding on."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([PYTHON, "naïve 中文"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(7)
    backend.enable_padding(length=5)
    spec = json.loads(backend.to_str())
    vocab = spec["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return json.dumps(spec)


def gpt2_like() -> str:
    """A tokenizer.json as GPT-2 has it, with an added token that is not special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [PYTHON, "日本語 🙂🙂"], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(["日本語"])
    return backend.to_str()


KINDS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe([PYTHON, "日本語 🙂🙂"], 320),
    "gpt2": lambda: JsonTokenizer(gpt2_like()),
    "sentencepiece": lambda: JsonTokenizer(sentencepiece_like(prefix=False)),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_and_byte_lengths(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


def test_random_unicode_round_trips(tokenizer):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    for _ in range(50):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_interface(tokenizer, tmp_path):
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eos_id] == 0
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    end, ids = tokenizer.eos_id, tokenizer.encode("ab")
    assert tokenizer.decode([end, *ids, end]) == "ab"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "ab"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("🙃")[:1])

    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert type(again) is type(tokenizer)
        assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)


def test_known_byte_lengths():
    llama = JsonTokenizer(sentencepiece_like(prefix=False))
    vocab = json.loads(llama.to_json())["model"]["vocab"]
    lengths = llama.token_bytes()
    assert [lengths[vocab[t]] for t in ("<unk>", "<s>", "</s>", "▁", "<0x0A>", "ï", "中")] == [0, 0, 0, 1, 1, 2, 3]
    gpt2 = JsonTokenizer(gpt2_like())
    vocab = json.loads(gpt2.to_json())["model"]["vocab"]
    assert [gpt2.token_bytes()[vocab[t]] for t in ("Ġ", "Ċ", "Ã", "ĠĠĠ")] == [1, 1, 1, 3]
    assert gpt2.token_bytes()[gpt2.encode("日本語")].tolist() == [9]  # one added token


def test_prefix_space_costs_one_byte_and_pieces_do_not_join():
    llama = JsonTokenizer(sentencepiece_like(prefix=True))
    ids = llama.encode(PYTHON)
    assert llama.decode(ids) == PYTHON
    assert llama.token_bytes()[ids].sum() == len(PYTHON.encode()) + 1
    assert not llama.pieces_join


def test_trained_bpe_is_deterministic_and_joins_indentation():
    one, two = (train_bpe([PYTHON], 320) for _ in range(2))
    assert one.to_json() == two.to_json()
    assert (one.eos_id, one.decode([0])) == (0, "")
    assert one.vocab_size <= 320
    assert "):\n    " in [one.decode([i]) for i in one.encode(PYTHON)]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_long_text_in_pieces_gives_the_same_tokens(kind):
    tokenizer = KINDS[kind]()
    assert tokenizer.pieces_join
    text = (PYTHON + "x = '🙂'\r\n\r\n\n# end\n\n\ny\n") * 20
    pieces = list(split_long(text, 50))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_eos_names_and_refusals(tmp_path):
    path = tmp_path / "tokenizer.json"
    for name in ("<|end_of_text|>", "<eos>"):
        path.write_text(gpt2_like().replace("<|endoftext|>", name))
        assert (
            load_tokenizer(path).eos_id
            == ByteTokenizer.vocab_size + len(json.loads(gpt2_like())["model"]["merges"]) - 1
        )
    path.write_text(gpt2_like().replace("<|endoftext|>", "<|strange|>"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer is .*tokenizer\.json.*one of <\|endoftext\|>, </s>"):
        load_tokenizer(path)
    path.write_text('{"not": "a tokenizer"}')
    with pytest.raises(ConfigError, match=r"must be a valid tokenizer\.json"):
        load_tokenizer(path)
    words = Backend(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    path.write_text(words.to_str())
    with pytest.raises(ConfigError, match=r"WordLevel .*does not keep text exactly"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'nowhere\.json': must be"):
        load_tokenizer("nowhere.json")
