"""Documents: the same ones in the same order everywhere, and a clear word about those that cannot be read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import socket
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skvr_dist.data.prepare.corpus import Corpus, hash_fraction, open_corpus
from skvr_dist.data.prepare.formats import COMPRESSIONS, Document, FilePart, LeftOut, read_part
from skvr_dist.errors import UserError


def compressed(data: bytes, suffix: str) -> bytes:
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
    }
    return bytes(compress.get(suffix, bytes)(data))


def write_lines(path: Path, *texts: str, key: str = "text") -> None:
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    path.write_bytes(compressed(lines, path.suffix))


def test_a_folder_is_read_in_sorted_order_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "z/c.py", "z/picture.png", "z/old/d.py", "y/e.txt", ".hidden/f.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else f"text of {name}\r\n", newline="")
    write_lines(tmp_path / "c.jsonl.gz", "first", "", "third")
    assert list(Corpus(tmp_path, exclude=["old"])) == [
        Document("a.txt", "text of a.txt\r\n"),
        Document("b.md", "text of b.md\r\n"),
        Document("c.jsonl.gz:0", "first"),
        Document("c.jsonl.gz:31", "third"),
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
    (tmp_path / "empty.txt").touch()
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"bad.txt at byte 3 is not valid UTF-8; .*--invalid-text skip"):
        list(Corpus(tmp_path))
    with pytest.raises(UserError, match=r"lines.jsonl at byte 26 is not valid UTF-8"):
        list(Corpus(tmp_path / "lines.jsonl"))
    corpus = Corpus(tmp_path, invalid_text="skip")
    for _ in range(2):
        assert [document.text for document in corpus] == ["good", "one"]
        assert corpus.left_out == {"is not valid UTF-8": 2, "holds half of a surrogate pair": 1, "is empty": 2}


def test_half_a_surrogate_pair_stops(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, the line at byte 0 holds half of a surrogate pair"):
        list(Corpus(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"the line at byte 16 is not JSON at its character 14: "),
        (b'{"body": "b"}', r"the line at byte 16 has no text under the key 'text'; name the right one with --text-key"),
        (b'{"text": 3}', r"the line at byte 16 has no text"),
        (b'"text"', r"the line at byte 16 has no text"),
        (b'{"text": "a", "text": "b"}', r"the line at byte 16 has more than one text under the key 'text'; mend it"),
        (b'{"text": "a", "more": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "the line at byte 16 is nested too deeply"),
        (b'{"text": "a\0"}', r"the line at byte 16 is not JSON at its character 12: "),
        ('{"text": "a"}'.encode("utf-16"), r"a.jsonl at byte 16 is not valid UTF-8"),
    ],
)
def test_a_line_without_text_stops_or_is_counted(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=message + r".*, or leave such documents out with --invalid-text skip"):
        list(Corpus(tmp_path))
    corpus = Corpus(tmp_path, invalid_text="skip")
    assert [document.text for document in corpus] == ["one", "two"]
    assert corpus.left_out.total() == 1


@pytest.mark.parametrize(
    "rest", ['"n": ' + "7" * 5000, '"n": 1e99999', '"n": NaN', '"n": 1, "n": 2', '"\\udc00": {"text": 1, "text": 2}']
)
def test_only_the_text_of_a_line_matters(tmp_path: Path, rest: str) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff\n{"text": "one", ' + rest + "}\r\n\r\n", newline="")
    assert list(Corpus(tmp_path)) == [Document("a.jsonl:4", "one")]


TEXTS: list[str | None] = ["eins", None, "", "zw\0ei\r\n", "\ufeffdrei"]
ARROW_TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "binary_view": pyarrow.binary_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("form", [".jsonl", *(".jsonl" + suffix for suffix in COMPRESSIONS), *ARROW_TYPES])
def test_every_format_takes_the_same_texts(tmp_path: Path, form: str) -> None:
    if form in ARROW_TYPES:
        values: Any = [text and text.encode() for text in TEXTS] if "binary" in form else TEXTS
        column = pyarrow.array(values, None if form == "dictionary" else ARROW_TYPES[form])
        column = column.dictionary_encode() if form == "dictionary" else column
        pyarrow.parquet.write_table(pyarrow.table({"text.more": values, "text": column}), tmp_path / "a.parquet")
        stored = pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type
        assert stored == ARROW_TYPES[form]
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
        (tmp_path / f"a{form}").write_bytes(compressed(codecs.BOM_UTF8 + lines, Path(form).suffix))
    corpus = Corpus(tmp_path)
    assert [document.text for document in corpus] == [text for text in TEXTS if text]
    assert corpus.left_out == {"is empty": 2}


@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
def test_a_text_file_is_a_document_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed(codecs.BOM_UTF8 + "zwölf\0\r\n".encode(), suffix))
    (tmp_path / f"b.md{suffix}").write_bytes(compressed(codecs.BOM_UTF8, suffix))
    (tmp_path / f"c.txt{suffix}").touch()
    (tmp_path / f"d.jsonl{suffix}").touch()
    corpus = Corpus(tmp_path)
    assert list(corpus) == [Document(f"a.txt{suffix}", "zwölf\0\r\n")]
    assert corpus.left_out == {"is empty": 2}


def test_a_corpus_of_nothing_but_empty_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match="holds no text: 2 documents were left out, 2 because each is empty"):
        list(Corpus(tmp_path))


RANDOM_LINES = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [b'{"text": "one"}', b'{"text": null}', b'{"text": [', b"[[[", b"\xef\xbb\xbf", b"\xff\xfe{\0", b"7" * 5000]
    )
).map(b"\n".join)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", *(f"a.jsonl{suffix}" for suffix in COMPRESSIONS)])
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=RANDOM_LINES, is_compressed=st.booleans())
def test_any_bytes_are_taken_left_out_or_refused(tmp_path: Path, name: str, data: bytes, is_compressed: bool) -> None:
    path = tmp_path / name
    path.write_bytes(compressed(data, path.suffix) if is_compressed else data)
    part = FilePart(name, path, path.stat().st_size, 0, path.stat().st_size)
    try:
        found = list(read_part(part, "text", lambda _: None))
    except UserError as error:  # the whole file
        assert str(error).startswith(f"cannot read {path}: ")
        assert not name.endswith((".txt", ".jsonl"))
        return
    for item in found:
        if isinstance(item, Document):
            assert item.text.encode().decode() == item.text != ""
        else:
            assert item.sentence.startswith(f"{item.place} ") and str(path) in item.place


def test_names_need_not_be_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    names = [b"caf\xe9.txt", b"d\xe9i.jsonl", b"z\xe9.parquet"]
    (tmp_path / "a.txt").write_text("eins")
    write_lines(tmp_path / "b.jsonl", "eins")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eins"]}), tmp_path / "c.parquet")
    for before, name in zip(("a.txt", "b.jsonl", "c.parquet"), names, strict=True):
        (tmp_path / before).rename(os.fsdecode(folder + b"/" + name))
    found = list(Corpus(tmp_path))
    assert [document.text for document in found] == ["eins"] * 3
    assert [os.fsencode(document.id.partition(":")[0]) for document in found] == names


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for corpus in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(UserError, match=r"cannot read .*pipe.txt: it is a named pipe, not a regular file"):
            list(Corpus(corpus))
    (tmp_path / "pipe.txt").unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.txt"))
        with pytest.raises(UserError, match=r"cannot read .*s.txt: it is a socket"):
            list(Corpus(tmp_path))
    (tmp_path / "s.txt").unlink()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for corpus in (tmp_path, tmp_path / "loop.txt"):
        with pytest.raises(UserError, match=r"cannot read .*loop.txt: Too many levels of symbolic links"):
            list(Corpus(corpus))
    with pytest.raises(UserError, match="cannot read /dev/zero: it is a device"):
        Corpus("/dev/zero")
    with pytest.raises(UserError, match="s3://bucket/x is a URL"):
        open_corpus("s3://bucket/x")


def test_capitals_end_names_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "A.JSONL", "eins")
    (tmp_path / "B.Txt").write_text("zwei")
    assert [document.text for document in Corpus(tmp_path)] == ["eins", "zwei"]
    assert [document.text for document in Corpus(tmp_path, suffixes=[".TXT"])] == ["zwei"]


def test_another_text_key(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", "one", key="body")
    assert list(Corpus(tmp_path, text_key="body")) == [Document("a.jsonl:0", "one")]


def write_records(path: Path, texts: list[str]) -> None:
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
        return
    write_lines(path, *texts)


@pytest.mark.parametrize("suffix", ["jsonl", *("jsonl" + suffix for suffix in COMPRESSIONS), "parquet"])
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), data=st.data())
def test_every_record_is_in_one_part(tmp_path: Path, suffix: str, texts: list[str], data: st.DataObject) -> None:
    path = tmp_path / f"records.{suffix}"
    write_records(path, texts)
    size = path.stat().st_size
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
    found: list[Document | LeftOut] = []
    advanced = 0
    for start, stop in pairwise([0, *cuts, size]):

        def advance(count: int) -> None:
            nonlocal advanced
            advanced += count

        found += read_part(FilePart(path.name, path, size, start, stop), "text", advance)
    whole = list(Corpus(path))
    assert [document.text for document in whole] == texts
    assert len({document.id for document in whole}) == len(texts)
    assert Counter(found) == Counter(whole)
    assert size * 0.9 - 10 <= advanced <= size + 10


def test_parquet_without_texts_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    corpus = Corpus(tmp_path, text_key="body")
    assert [document.text for document in corpus] == ["a"] and corpus.left_out == {"is empty": 1}
    with pytest.raises(UserError, match=r"a.parquet has no column 'text', only body, n; name the right one with --tex"):
        list(Corpus(tmp_path))
    with pytest.raises(UserError, match=r"column 'n' of .*a.parquet holds int64, not text"):
        list(Corpus(tmp_path, text_key="n"))
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has 2 columns 'text'"):
        list(Corpus(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot read .*a.parquet: "):
        list(Corpus(tmp_path))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing does not exist; give a file, a folder or the name stdlib"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"holds no text; read were files that end in \.txt, "):
        list(Corpus(tmp_path))
    for cut in [tmp_path / f"cut.jsonl{suffix}" for suffix in COMPRESSIONS]:
        write_records(cut, ["word " * 1000] * 5)
        cut.write_bytes(cut.read_bytes()[:-20])
        with pytest.raises(UserError, match=rf"cannot read .*{cut.name}: "):
            list(Corpus(tmp_path, invalid_text="skip"))
        cut.write_bytes(b'{"text": "not compressed"}\n')
        with pytest.raises(UserError, match=rf"cannot read .*{cut.name}: "):
            list(Corpus(tmp_path))
        cut.unlink()
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"cannot read .*a.txt: No such file or directory"):
        list(Corpus(tmp_path))


def test_fractions_are_spread_and_independent() -> None:
    held_out = [i for i in range(10_000) if hash_fraction(f"doc {i}", "validation") < 0.05]
    assert 400 < len(held_out) < 600
    sampled = [i for i in held_out if hash_fraction(f"doc {i}", "tokenizer") < 0.5]
    assert 0.4 < len(sampled) / len(held_out) < 0.6
    assert 0 <= hash_fraction("not \udcff UTF-8", "validation") < 1
