"""Corpora: what is read, in which order, what is left out, and what the errors say."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from dmoe.config import DataConfig
from dmoe.data import CorpusStats, read_corpus
from dmoe.errors import ConfigError


def read(corpus: object, **settings: str) -> dict[str, str]:
    return {d.name: d.text for d in read_corpus(DataConfig(corpus=str(corpus), **settings))}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_folder_keeps_text_in_order_and_leaves_out_the_rest(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": b"two\r\n\tlines",
            "a/z.py": "schön 🙂".encode(),
            "a/latin1.txt": "schön".encode("latin-1"),
            "image.bin": b"ab\0cd",
            "empty.txt": b"",
            "copy.txt": b"two\r\n\tlines",
            ".hidden": b"secret",
            ".git/config": b"secret too",
        },
    )
    os.mkfifo(tmp_path / "pipe")  # reading it would hang
    stats = CorpusStats()
    documents = list(read_corpus(DataConfig(corpus=str(tmp_path)), stats))
    assert [(d.name, d.text) for d in documents] == [("a/z.py", "schön 🙂"), ("b.txt", "two\r\n\tlines")]
    assert documents[0].digest == hashlib.sha256("schön 🙂".encode()).digest()
    assert documents[0].num_bytes == 11
    assert stats == CorpusStats(documents=2, num_bytes=22, not_text=2, empty=1, duplicates=1)
    assert stats.note() == "2 not UTF-8 text, 1 empty, 1 exact duplicates"


def test_named_file_is_kept_byte_for_byte(tmp_path):
    raw = "\ufeffnul \0 cr\r\nlf\n".encode()
    write(tmp_path, {"one.txt": raw})
    assert read(tmp_path / "one.txt")["one.txt"].encode() == raw


def test_glob_recurses_and_names_are_relative(tmp_path):
    write(tmp_path, {"x/1.md": b"1", "x/y/2.md": b"2", "x/3.txt": b"3"})
    assert read(tmp_path / "**" / "*.md") == {"1.md": "1", "y/2.md": "2"}


def test_brackets_in_an_existing_name_are_no_glob(tmp_path):
    write(tmp_path, {"[ab].txt": b"brackets", "a.txt": b"a"})
    assert read(tmp_path / "[ab].txt") == {"[ab].txt": "brackets"}


def test_stdlib_is_source_without_tests_and_packages():
    names = list(read("stdlib"))
    assert names == sorted(names)
    assert {"json/decoder.py", "typing.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test"}


def test_stdlib_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dmoe.data.corpus.sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.corpus is 'stdlib': .*no library source"):
        read("stdlib")


def test_jsonl_one_document_a_line_also_in_a_folder(tmp_path):
    lines = [
        "\ufeff" + json.dumps({"body": "eins\n"}),
        "",
        json.dumps({"body": "zw\u2028ei", "n": 1}, ensure_ascii=False),
    ]
    write(tmp_path, {"c/d.jsonl": "\r\n".join(lines).encode(), "e.txt": b"plain"})
    expected = {"d.jsonl:1": "eins\n", "d.jsonl:3": "zw\u2028ei"}
    assert read(tmp_path / "c" / "d.jsonl", text_field="body") == expected
    in_folder = {**{f"c/{name}": text for name, text in expected.items()}, "e.txt": "plain"}
    assert read(tmp_path, text_field="body") == in_folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "must be one JSON object in UTF-8"),
        (b'{"text": "\xff"}', "must be one JSON object in UTF-8"),
        ('{"text": "utf-16"}'.encode("utf-16-be") + b"\0", "must be one JSON object in UTF-8"),
        (b"[" * 100_000, "must be one JSON object in UTF-8"),
        (b'["text"]', "must be a JSON object, not list"),
        (b'{"body": "x", "id": 3}', r"has no field 'text' \(data.text_field\); its fields: 'body', 'id'"),
        (b'{"text": null}', "field 'text' must be a string, not NoneType"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_jsonl_errors_name_file_line_and_field(tmp_path, line, message):
    write(tmp_path, {"bad.jsonl": b'{"text": "good"}\n' + line + b"\n"})
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, line 2: .*{message}"):
        read(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "must be .* the path of an existing"),
        ("no*where", "a glob that matches at least one file"),
        ("hollow", "at least one document"),
        ("zero.txt", r"at least one document \(left out: 1 empty\)"),
        ("latin1.txt", "UTF-8 text, but byte 3 does not decode"),
        ("pipe", "a regular file or a folder"),
    ],
)
def test_unusable_corpus_is_refused_by_name(tmp_path, name, message):
    write(tmp_path, {"zero.txt": b"", "latin1.txt": b"sch\xf6n"})
    (tmp_path / "hollow").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"data.corpus is {str(tmp_path / name)!r}: must be ")
    assert error.match(message)


def test_unreadable_file_in_a_folder_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"a", "b.txt": b"b"})
    read_bytes = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", denied)  # chmod does not stop root
    with pytest.raises(ConfigError, match=r"b\.txt is not: Permission denied"):
        read(tmp_path)
