"""The packed token file: what is written is what is read, and damage is refused by name."""

import hashlib
import json

import numpy as np
import pytest

from dmoe.data import TokenFile, TokenWriter
from dmoe.errors import RunError

DOCUMENTS = [[5, 6, 7], [], [1] * 10]


def write(folder, vocab_size=300, documents=DOCUMENTS, eos_id=256):
    with TokenWriter(folder, vocab_size, eos_id) as writer:
        for ids in documents:
            writer.extend(ids[:2], 2 * len(ids[:2]))
            writer.extend(np.array(ids[2:], dtype=np.uint16), 2 * len(ids[2:]))
            writer.end_document()
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    file = TokenFile.open(write(tmp_path, vocab_size, [*DOCUMENTS, [top]], eos_id=0))
    expected = [5, 6, 7, 0, 0, *[1] * 10, 0, top, 0]
    assert file.tokens.tolist() == expected
    assert file.tokens.dtype == np.dtype(dtype)
    assert len(file) == len(expected)
    assert isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable
    assert file.doc_starts.tolist() == [0, 4, 5, 16, 18]
    assert file.doc_starts.dtype == np.int64
    raw = np.array(expected, dtype=dtype).tobytes()
    assert (tmp_path / "tokens.bin").read_bytes() == raw
    assert vars(file.meta) == {
        "format_version": 1, "dtype": dtype, "num_tokens": 18, "num_documents": 4, "text_bytes": 28,
        "vocab_size": vocab_size, "eos_id": 0, "sha256": hashlib.sha256(raw).hexdigest(),
    }  # fmt: skip
    file.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["doc_starts.npy", "meta.json", "tokens.bin"]


@pytest.mark.parametrize("token", [-1, 300])
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_finished(tmp_path, token):
    with pytest.raises(ValueError, match="must be in"), TokenWriter(tmp_path, 300, 256) as writer:
        writer.extend([1, token], 1)
    with pytest.raises(RunError, match=r"cannot open token file .*meta\.json"):
        TokenFile.open(tmp_path)


@pytest.mark.parametrize("name", ["tokens.bin", "doc_starts.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "one byte less", "longer", "empty", "gone"])
def test_wrong_sizes_are_refused_by_name(tmp_path, name, damage):
    path = write(tmp_path) / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        longer = raw + (b"}" if name == "meta.json" else raw)
        path.write_bytes(
            {"cut": raw[: len(raw) // 2], "one byte less": raw[:-2], "longer": longer, "empty": b""}[damage]
        )
    if name == "doc_starts.npy" and damage == "longer":
        return  # np.load reads the array and stops: harmless
    with pytest.raises(RunError, match=rf"token file .*{name}"):
        TokenFile.open(tmp_path)


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"dtype": "object"}, {"num_tokens": 17}, {"num_documents": 2}, {"num_tokens": -1}]
)
def test_meta_that_does_not_fit_is_refused(tmp_path, change):
    path = write(tmp_path) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError, match="token file"):
        TokenFile.open(tmp_path)


def test_verify_finds_a_changed_token(tmp_path):
    path = write(tmp_path) / "tokens.bin"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    file = TokenFile.open(tmp_path)
    with pytest.raises(RunError, match="sha256"):
        file.verify()
