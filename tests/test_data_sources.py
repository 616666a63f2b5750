"""Documents: the same ones in the same order everywhere, and a clear word about those that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from skvr_dist.data.sources import Corpus, Document, document_fraction, open_corpus
from skvr_dist.errors import UserError


def write_lines(path: Path, *texts: str, key: str = "text") -> None:
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def test_a_folder_is_read_in_sorted_order_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "z/c.py", "z/picture.png", "z/old/d.py", "y/e.txt", ".hidden/f.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else f"text of {name}\r\n", newline="")
    write_lines(tmp_path / "c.jsonl.gz", "first", "", "third")
    assert list(Corpus(tmp_path, exclude=["old"])) == [
        Document("a.txt", "text of a.txt\r\n"),
        Document("b.md", "text of b.md\r\n"),
        Document("c.jsonl.gz:1", "first"),
        Document("c.jsonl.gz:3", "third"),
        Document("y/e.txt", "text of y/e.txt\r\n"),
        Document("z/c.py", "text of z/c.py\r\n"),
    ]
    assert [d.id for d in Corpus(tmp_path, suffixes=[".py"], exclude=["z/c.*"])] == ["z/old/d.py"]
    assert [d.id for d in Corpus(tmp_path / "z" / "picture.png")] == ["picture.png"]


def test_the_standard_library_is_readable_code() -> None:
    corpus = open_corpus("stdlib", exclude=["tkinter"])
    documents = list(corpus)
    ids = [document.id for document in documents]
    assert "argparse.py" in ids
    folders = {folder for i in ids for folder in i.split("/")[:-1]}
    assert {"asyncio", "unittest"} <= folders
    assert not folders & {"site-packages", "test", "tests", "idle_test", "encodings", "tkinter"}
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert documents == list(corpus)


def test_invalid_utf8_stops_or_is_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"bad.txt is not valid UTF-8 at byte 3; .*--invalid-text skip"):
        list(Corpus(tmp_path))
    with pytest.raises(UserError, match=r"lines.jsonl, line 2 is not valid UTF-8 at byte 26 of the file"):
        list(Corpus(tmp_path / "lines.jsonl"))
    corpus = Corpus(tmp_path, invalid_text="skip")
    for _ in range(2):
        assert [document.text for document in corpus] == ["good", "one"]
        assert corpus.skipped == 3


def test_half_a_surrogate_pair_stops(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1 holds half of a surrogate pair"):
        list(Corpus(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 2 is not JSON at its character 14: "),
        (b'{"body": "b"}', r"line 2 has no text under the key 'text'; name the right one with --text-key"),
        (b'{"text": 3}', r"line 2 has no text"),
        (b'"text"', r"line 2 has no text"),
    ],
)
def test_a_line_without_text_stops(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(Corpus(tmp_path, invalid_text="skip"))


def test_another_text_key(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", "one", key="body")
    assert list(Corpus(tmp_path, text_key="body")) == [Document("a.jsonl:1", "one")]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing does not exist; give a file, a folder or the name stdlib"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"holds no text; read were \.txt, "):
        list(Corpus(tmp_path))
    write_lines(tmp_path / "cut.jsonl.gz", *["word " * 1000] * 5)
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "cut.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*cut.jsonl.gz: "):
        list(Corpus(tmp_path))
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"cannot read .*a.txt: No such file or directory"):
        list(Corpus(tmp_path))


def test_fractions_are_spread_and_independent() -> None:
    held_out = [i for i in range(10_000) if document_fraction(f"doc {i}", "validation") < 0.05]
    assert 400 < len(held_out) < 600
    sampled = [i for i in held_out if document_fraction(f"doc {i}", "tokenizer") < 0.5]
    assert 0.4 < len(sampled) / len(held_out) < 0.6
    assert 0 <= document_fraction("not \udcff UTF-8", "validation") < 1
