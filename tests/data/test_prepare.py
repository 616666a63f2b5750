"""Data sets on disk: the same bytes however they are made, nothing half made, no damage unseen."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from skvr_dist.data.format import smallest_token_type
from skvr_dist.data.prepare import writer
from skvr_dist.data.prepare.corpus import LEFT_OUT_FILE, Corpus, hash_fraction, open_corpus
from skvr_dist.data.prepare.formats import FilePart, holds_records
from skvr_dist.data.prepare.prepare import Prepared, deal, prepare
from skvr_dist.data.prepare.writer import ShardWriter, write_manifest
from skvr_dist.data.shards import Dataset, check_dataset, find_datasets
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.data.tokenizers.sentencepiece import SentencePieceTokenizer
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import EXIT_MISSED, EXIT_USAGE, UserError

DOCUMENTS = [document for document in open_corpus("stdlib") if document.id.startswith(("json/", "email/", "xml/"))]
TOKENIZER = train_tokenizer(DOCUMENTS, vocab_size=500)
ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents: half of them as files, half of them as lines."""
    folder = tmp_path_factory.mktemp("source")
    for document in DOCUMENTS[::2]:
        (folder / document.id).parent.mkdir(parents=True, exist_ok=True)
        (folder / document.id).write_text(document.text)
    lines = [json.dumps({"text": document.text}) + "\n" for document in DOCUMENTS[1::2]]
    (folder / "lines.jsonl").write_text("".join(lines))
    return folder


OPTIONS: dict[str, Any] = {"num_shards": 4, "validation_share": 0.3}


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_TOKENS", 10_000)
        prepare(Corpus(source), TOKENIZER, output, workers=1, **OPTIONS)
    return output


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_TOKENS", 10_000)


def texts_of(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(name, text) of every document."""
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.open_shard(number)
        for chunk in range(len(shard.chunks)):
            tokens, offsets = shard.read(chunk)
            for name, (start, end) in zip(shard.names(chunk), pairwise(offsets), strict=True):
                assert tokens[end - 1] == TOKENIZER.eos_id
                yield name, TOKENIZER.decode(tokens[start : end - 1].tolist())


def test_every_document_is_in_one_data_set(source: Path, prepared: Path) -> None:
    found = {split: sorted(texts_of(dataset)) for split, dataset in find_datasets(prepared).items()}
    documents = list(Corpus(source))
    held_out = [document for document in documents if hash_fraction(document.text, "validation") < 0.3]
    assert 0 < len(held_out) < len(documents)
    assert found == {"train": sorted(set(documents) - set(held_out)), "validation": sorted(held_out)}


def test_the_manifest_and_the_indices_count(prepared: Path) -> None:
    for dataset in find_datasets(prepared).values():
        manifest = dataset.manifest
        assert manifest.token_type == "uint16"
        assert manifest.vocab_size == 500
        assert manifest.tokenizer_sha256 == TOKENIZER.sha256
        sizes = [shard.tokens for shard in manifest.shards]
        assert sum(sizes) == manifest.tokens
        assert manifest.text_bytes == sum(len(text.encode()) for _, text in texts_of(dataset))
        assert check_dataset(dataset) == []
    assert any(len(Dataset.open(prepared / "train").open_shard(i).chunks) > 1 for i in range(4))
    assert load_tokenizer(prepared / "tokenizer.model").sha256 == TOKENIZER.sha256


def test_webdataset_reads_the_shards(prepared: Path) -> None:
    dataset = Dataset.open(prepared / "train")
    paths = [str(prepared / "train" / shard.file) for shard in dataset.manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    names = [name for sample in samples for name in json.loads(sample["names"])]
    assert names == [name for name, _ in texts_of(dataset)]
    tokens = np.concatenate([np.frombuffer(sample["tokens"], dtype="<u2") for sample in samples])
    lengths = np.concatenate([np.frombuffer(sample["lengths"], dtype="<u4") for sample in samples])
    assert len(tokens) == lengths.sum() == dataset.manifest.tokens


@pytest.mark.parametrize("workers", [2, None])
def test_the_number_of_processes_changes_nothing(
    source: Path, prepared: Path, tmp_path: Path, workers: int | None
) -> None:
    prepare(Corpus(source), TOKENIZER, tmp_path, workers=workers, **OPTIONS)
    assert all_bytes(tmp_path) == all_bytes(prepared)


@given(
    files=st.lists(st.tuples(st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".parquet"]), st.integers(0, 10_000))),
    shards=st.integers(1, 9),
)
@settings(deadline=None)
def test_every_byte_is_dealt_once(files: list[tuple[str, int]], shards: int) -> None:
    parts = [FilePart(f"{n}{kind}", Path(f"{n}{kind}"), size, 0, size) for n, (kind, size) in enumerate(files)]
    try:
        dealt = deal(parts, shards)
    except UserError as error:
        assert "too few" in str(error)
        return
    found: dict[str, list[tuple[int, int]]] = {}
    for part in (part for share in dealt.values() for part in share):
        assert part.stop - part.start == part.size or holds_records(part.name)
        found.setdefault(part.name, []).append((part.start, part.stop))
    for part in parts:
        cuts = sorted(found.get(part.name, []))
        assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]]
        assert not part.size or (cuts[0][0], cuts[-1][1]) == (0, part.size)
    texts = [part.size for part in parts if not holds_records(part.name)]
    sizes = [sum(part.stop - part.start for part in share) for share in dealt.values()]
    assert max(sizes) - min(sizes) <= max(texts, default=0) + 1  # 1: stretches of records end at whole bytes


def test_odd_document_names(tmp_path: Path) -> None:
    names = ["__init__.txt", "a.b.c.txt", "a" * 200 + ".txt", "ümlaut %2E.txt", "not \udcff UTF-8.txt"]
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_text("text")
    (tmp_path / "source" / "empty \udcff.txt").touch()
    made = prepare(Corpus(tmp_path / "source"), TOKENIZER, tmp_path / "data", num_shards=1, workers=1)
    assert sorted(name for name, _ in texts_of(made.datasets["train"])) == sorted(names)
    left_out = (tmp_path / "data" / LEFT_OUT_FILE).read_bytes()
    assert left_out == os.fsencode(tmp_path) + b"/source/empty \xff.txt is empty\n"
    assert check_dataset(made.datasets["train"]) == []


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [smallest_token_type(n) for n in (65_536, 65_537)] == ["uint16", "uint32"]
    monkeypatch.setattr(SentencePieceTokenizer, "vocab_size", 65_537)
    with ShardWriter(tmp_path / "shard-00000.tar", TOKENIZER) as shard:
        shard.write("a", [65_536, 2], text_bytes=1)
        shard.publish()
    write_manifest(tmp_path, TOKENIZER)
    assert Dataset.open(tmp_path).open_shard(0).read(0).tokens.tolist() == [65_536, 2]


def test_what_is_left_out_is_named_and_counted(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"one"), ("b.txt", b""), ("c.txt", b"\xff"), ("d.txt", b"two"), ("e.txt", b"")):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    corpus = Corpus(tmp_path / "source", invalid_text="skip")
    made = prepare(corpus, TOKENIZER, tmp_path / "data", num_shards=2, workers=2).datasets["train"]
    assert made.manifest.left_out == {"is empty": 2, "is not valid UTF-8": 1}
    lines = sorted((tmp_path / "data" / LEFT_OUT_FILE).read_text().splitlines())
    folder = tmp_path / "source"
    assert lines == [
        f"{folder}/b.txt is empty",
        f"{folder}/c.txt at byte 0 is not valid UTF-8",
        f"{folder}/e.txt is empty",
    ]
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for inside in ("source/data", "source/data", "link/../source/data", "link/data"):
        again = prepare(corpus, TOKENIZER, tmp_path / inside, num_shards=2, workers=1)
        assert again.datasets["train"].manifest == made.manifest
    assert not again.written and [part.name for part in corpus.files()] == [f"{name}.txt" for name in "abcde"]
    (tmp_path / "source" / LEFT_OUT_FILE).write_text("one of the user's")
    assert LEFT_OUT_FILE in [part.name for part in corpus.files()]
    with pytest.raises(UserError, match=r"c.txt at byte 0 is not valid UTF-8; convert it, or leave such"):
        prepare(Corpus(tmp_path / "source"), TOKENIZER, tmp_path / "other", num_shards=2, workers=2)


def test_preparing_again_is_quick_or_refused(source: Path, prepared: Path, tmp_path: Path) -> None:
    before = all_bytes(prepared)

    def again(source: Path = source, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Prepared:
        return prepare(Corpus(source), tokenizer, prepared, **{**OPTIONS, **options})

    assert not again().written
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / DOCUMENTS[0].id).write_text(DOCUMENTS[0].text[:-1] + "#")
    with pytest.raises(UserError, match=r"made with corpus \w{12}, not \w{12}; remove it or choose another output"):
        again(changed)
    with pytest.raises(UserError, match="made with number of shards 4, not 5;"):
        again(num_shards=5)
    with pytest.raises(UserError, match=r"made with validation share 0\.3, not 0\.0;"):
        again(validation_share=0.0)
    other = train_tokenizer(DOCUMENTS, vocab_size=501)
    with pytest.raises(UserError, match=rf"made with tokenizer {TOKENIZER.sha256[:12]}, not {other.sha256[:12]};"):
        again(tokenizer=other)
    assert all_bytes(prepared) == before


SLOW_PREPARE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
from skvr_dist.data.prepare import prepare, writer
from skvr_dist.data.prepare.corpus import Corpus
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
writer.CHUNK_TOKENS = 10_000
publish = writer.ShardWriter.publish
def slowly(self):
    if self._path.parent.name == "train" and self._path.stem[-1] in "23":
        time.sleep(60)
    return publish(self)
writer.ShardWriter.publish = slowly
source, model, output = sys.argv[1:]
prepare.prepare(Corpus(source), load_tokenizer(model), output, num_shards=4, validation_share=0.3, workers=1)
"""


def test_a_killed_run_goes_on_with_what_is_finished(source: Path, prepared: Path, tmp_path: Path) -> None:
    arguments = [str(source), str(prepared / "tokenizer.model"), str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARE, *arguments], cwd=ROOT)
    partial = tmp_path / "partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("done-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(UserError, match="partial is being written by another process that prepares the same output;"):
        prepare(Corpus(source), TOKENIZER, tmp_path, **OPTIONS)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("train/shard-*.json")}
    assert sorted(kept) == ["shard-00000.json", "shard-00001.json"]
    for folder in (tmp_path, partial / "train"):
        with pytest.raises(UserError, match="holds no complete data set"):
            Dataset.open(folder)
    with pytest.raises(UserError, match=r"partial holds unfinished work made with validation share 0\.3, not 0\.2;"):
        prepare(Corpus(source), TOKENIZER, tmp_path, **{**OPTIONS, "validation_share": 0.2})
    prepare(Corpus(source), TOKENIZER, tmp_path, workers=1, **OPTIONS)
    assert all_bytes(tmp_path) == all_bytes(prepared)
    assert {name: (tmp_path / "train" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_run_that_is_stopped_tidies_its_processes(source: Path, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.model")
    slow = SLOW_PREPARE.replace("time.sleep(60)", "[(open(sys.argv[3] + '/started', 'w'), time.sleep(0.5))]")
    arguments = [str(source), str(tmp_path / "tokenizer.model"), str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "train").exists()


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_complete(
    source: Path, prepared: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file, smaller than a shard."""
    script = (
        "import resource, signal; from skvr_dist.commands.prepare_data import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); main()"
    )
    command = ["--input", source, "--tokenizer", prepared / "tokenizer.model", "--output", tmp_path, "--shards", "4"]
    arguments = [*map(str, command), "--validation-share", "0.3"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_USAGE
    assert f"cannot write data set {tmp_path}: [Errno 27] File too large" in done.stderr
    assert "the same command continues" in done.stderr
    assert not list(tmp_path.rglob("train/*.tar"))
    assert not list(tmp_path.rglob("*.tar.partial"))
    prepare(Corpus(source), TOKENIZER, tmp_path, **OPTIONS)
    assert all_bytes(tmp_path) == all_bytes(prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 0}, "--shards 0 and --workers 1 must be positive"),
        ({"num_shards": 1, "workers": 0}, "--shards 1 and --workers 0 must be positive"),
        ({"num_shards": 1, "validation_share": 1.0}, "--validation-share 1.0 must be at least 0 and below 1"),
        ({"num_shards": 1, "validation_share": 1e-9}, "no document falls into --validation-share 1e-09; remove"),
        ({"num_shards": 500}, r"training shard \d+ would hold no document; ask for fewer --shards"),
        ({"num_shards": 10**8}, r"--shards 100000000 are too many; ask for at most 100000"),
        ({"num_shards": 1, "workers": 10**8}, r"--workers 100000000 are too many processes for \d+ cores; at most \d+"),
    ],
)
def test_impossible_requests_leave_no_data_set(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(Corpus(source), TOKENIZER, tmp_path, **{"workers": 1, **options})
    assert not (tmp_path / "train").exists()


def test_too_few_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="1 files are too few for --shards 2; ask for at most 1"):
        prepare(Corpus(tmp_path), TOKENIZER, tmp_path / "data", num_shards=2)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_corpus_of_empty_documents_is_not_a_matter_of_shards(tmp_path: Path, shards: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n' * 3)
    # An output within the corpus is no part of it.
    with pytest.raises(UserError, match="holds no text: 6 documents were left out, 6 because each is empty; give one"):
        prepare(Corpus(tmp_path), TOKENIZER, tmp_path / "data", num_shards=shards, workers=1)


def test_an_output_that_cannot_be_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path / "file", rf"cannot write {tmp_path}/file: {tmp_path}/file is not a folder"),
        (tmp_path / "file" / "data", rf"cannot write {tmp_path}/file/data: {tmp_path}/file is not a folder"),
        (tmp_path / ("x" * 300), "cannot write .*: File name too long"),
        (Path("s3://bucket/data"), "s3:/bucket/data is a URL"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(Corpus(source), TOKENIZER, output, num_shards=1, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and not Path("s3:").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\0"])
def test_damaged_notes_of_unfinished_work_are_refused(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "job.json").write_text(content)
    with pytest.raises(UserError, match=r"job.json is damaged; remove .*partial and start anew"):
        prepare(Corpus(source), TOKENIZER, tmp_path, num_shards=1, workers=1)


def test_another_tokenizer_in_the_output_is_refused(source: Path, tmp_path: Path) -> None:
    train_tokenizer(DOCUMENTS, vocab_size=501).save(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model holds another tokenizer"):
        prepare(Corpus(source), TOKENIZER, tmp_path, num_shards=1, workers=1)


def test_a_folder_of_somebody_elses_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-00000.tar").write_text("precious")
    with pytest.raises(UserError, match=r"train is there already; remove it or choose another output"):
        prepare(Corpus(source), TOKENIZER, tmp_path, num_shards=1, workers=1)
    assert (tmp_path / "train" / "shard-00000.tar").read_text() == "precious"


# Damage. `edit_index` lets a damage through the tests that come before the one it is meant for.


def edit_index(folder: Path, data: bytes, **chunk: Any) -> None:
    """Write the first shard anew; its index then has the right checksum, and other facts about the first chunk."""
    (folder / "shard-00000.tar").write_bytes(data)
    path = folder / "shard-00000.json"
    tree = json.loads(path.read_text())
    first = tree["chunks"][0]
    first |= chunk
    opened = Dataset.open(folder, check_sizes=False).open_shard(0).chunks[0]
    first["crc32"] = zlib.crc32(data[opened.start : opened.start + opened.bytes(2)])
    path.write_text(json.dumps(tree))


def test_a_missing_or_truncated_shard_is_refused(copy: Path) -> None:
    shard = copy / "train" / "shard-00002.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    with pytest.raises(
        UserError, match=rf"shard file .*shard-00002.tar has {size // 2} bytes, .*names {size} bytes; c"
    ):
        Dataset.open(copy / "train")
    opened = Dataset.open(copy / "train", check_sizes=False).open_shard(2)
    opened.read(0)
    last = len(opened.chunks) - 1
    with pytest.raises(
        UserError, match=rf"shard-00002.tar is damaged: chunk {last} at byte \d+: the file ends \d+ byte"
    ):
        opened.read(last)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard file .*shard-00002.tar is missing"):
        Dataset.open(copy / "train")


def test_damaged_chunks_are_named(copy: Path) -> None:
    folder = copy / "train"
    whole = (folder / "shard-00000.tar").read_bytes()
    start = Dataset.open(folder).open_shard(0).chunks[0].start

    def refusal() -> str:
        place = rf"shard .*train/shard-00000.tar is damaged: chunk 0 at byte {start}: "
        with pytest.raises(UserError, match=place) as caught:
            Dataset.open(folder).open_shard(0).read(0)
        return str(caught.value)

    def changed(at: int, value: int) -> bytes:
        return whole[:at] + bytes([value]) + whole[at + 1 :]

    (folder / "shard-00000.tar").write_bytes(changed(start + 1000, whole[start + 1000] ^ 1))
    assert "its bytes do not have the checksum that the index names" in refusal()
    edit_index(folder, changed(start + 1, 0xFF))
    assert "it holds token 65" in refusal() and "outside the vocabulary of 500" in refusal()
    chunk = Dataset.open(folder).open_shard(0).chunks[0]
    edit_index(folder, changed(start + chunk.lengths_at(2), whole[start + chunk.lengths_at(2)] ^ 1))
    assert f"but the index names {chunk.tokens}" in refusal()
    first_length = int.from_bytes(whole[start + chunk.lengths_at(2) :][:4], "little")
    edit_index(folder, changed(start + 2 * first_length - 2, 7))
    (problem, other) = check_dataset(Dataset.open(folder))
    assert "1 documents do not end with token 2" in problem
    assert "shard-00000.tar differs between its chunks" in other


def test_a_damaged_index_is_refused(copy: Path) -> None:
    index = copy / "train" / "shard-00000.json"
    tree = json.loads(index.read_text())
    for text, message in (
        ("{", "shard-00000.json is not valid: "),
        (json.dumps({**tree, "chunks": tree["chunks"][1:]}), "is not valid: .*documents is .* but the chunks hold"),
        (json.dumps({**tree, "tokenizer_sha256": ""}), "is not the index of the shard that the manifest names"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            Dataset.open(copy / "train").open_shard(0)
        assert len(check_dataset(Dataset.open(copy / "train"))) == 1
    index.unlink()
    with pytest.raises(UserError, match=r"shard file .*shard-00000.json is missing, but the manifest names it"):
        Dataset.open(copy / "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not the manifest of a data set"),
        ('{"shards": []}', "manifest.json is not the manifest of a data set"),
        ('{"format_version": 9}', "has format version 9, but this version of skvr_dist reads 2"),
        ('{"format_version": 2}', "manifest.json is not valid: token_type: Field required"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Dataset.open(tmp_path)


def test_what_is_no_data_set_is_refused_with_a_way_out(prepared: Path) -> None:
    for name, message in (
        ("tokenizer.model", r"tokenizer.model is no folder, as a data set is; make one .* name their format"),
        ("", r"\(manifest.json is missing\); give .*/train"),
    ):
        with pytest.raises(UserError, match=message):
            Dataset.open(prepared / name)


def test_a_manifest_that_contradicts_itself_is_refused(copy: Path) -> None:
    tree = json.loads((copy / "train" / "manifest.json").read_text())
    for key, value, message in (
        ("tokens", tree["tokens"] + 1, rf"tokens is {tree['tokens'] + 1}, but the shards hold {tree['tokens']}"),
        ("vocab_size", 65_537, "vocab_size 65537 does not fit token_type uint16"),
    ):
        (copy / "train" / "manifest.json").write_text(json.dumps({**tree, key: value}))
        with pytest.raises(UserError, match=f"manifest.json is not valid: {message}; copy it again"):
            Dataset.open(copy / "train")


def test_models_and_data_sets_that_do_not_fit_are_refused(source: Path, prepared: Path, tmp_path: Path) -> None:
    train = Dataset.open(prepared / "train")
    train.require_vocabulary(500)
    with pytest.raises(UserError, match=r"has a vocabulary of 500, but model\.vocab_size is 499"):
        train.require_vocabulary(499)
    train.require_same_tokenizer(Dataset.open(prepared / "validation"))
    other = train_tokenizer(DOCUMENTS, vocab_size=501)
    made = prepare(Corpus(source), other, tmp_path, num_shards=1, workers=1).datasets["train"]
    with pytest.raises(UserError, match=rf"tokenizer {TOKENIZER.sha256[:12]}, but .* with {other.sha256[:12]}"):
        train.require_same_tokenizer(made)


def test_a_data_set_behind_a_pipe_is_read_the_same(prepared: Path) -> None:
    local, remote = Dataset.open(prepared / "train"), Dataset.open(f"pipe:cat {prepared}/train/{{file}}")
    assert remote.manifest == local.manifest
    assert list(texts_of(remote)) == list(texts_of(local))
    with pytest.raises(UserError, match=r"cannot read pipe:cat /nowhere/manifest.json: "):
        Dataset.open("pipe:cat /nowhere/{file}")


def test_locations_that_cannot_be_opened_are_refused(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for location in ("s3://bucket/train", "nonsense://x/{file}"):
        with pytest.raises(
            UserError, match=rf"data set {location} cannot be opened: webdataset knows the schemes .*gs"
        ):
            Dataset.open(location)
    with pytest.raises(UserError, match="s3://bucket is a URL"):
        find_datasets("s3://bucket")
    monkeypatch.setenv("HOME", str(prepared))
    assert Dataset.open("~/train") == Dataset.open(prepared / "train")
    assert find_datasets("~").keys() == {"train", "validation"}


def test_a_data_set_behind_a_web_server_is_read_the_same(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(prepared))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        local, remote = Dataset.open(prepared / "train"), Dataset.open(f"{address}/train")
        assert remote.manifest == local.manifest
        assert list(texts_of(remote)) == list(texts_of(local))
        with pytest.raises(UserError, match=rf"cannot read {address}/nowhere/manifest.json: "):
            Dataset.open(f"{address}/nowhere")
        server.shutdown()


# The command lines.


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    return stop.value.code


def test_the_commands_from_text_to_checked_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, output, report = tmp_path / "corpus.jsonl", tmp_path / "data", tmp_path / "report.json"
    corpus.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in DOCUMENTS))
    model = output / "tokenizer.model"
    assert run(monkeypatch, "train_tokenizer.py", "--input", corpus, "--vocab-size", "500", "--output", model) == 0
    assert "500 pieces, sha256" in capsys.readouterr().out
    arguments = [
        "--input",
        corpus,
        "--tokenizer",
        model,
        "--output",
        output,
        "--shards",
        "4",
        "--validation-share",
        ".3",
    ]
    assert run(monkeypatch, "prepare_data.py", *arguments) == 0
    assert "nothing was written" not in capsys.readouterr().out
    assert run(monkeypatch, "prepare_data.py", *arguments) == 0
    assert "holds these data sets already; nothing was written" in capsys.readouterr().out
    assert run(monkeypatch, "prepare_data.py", "--check", output, "--json", report) == 0
    assert [row["data_set"] for row in json.loads(report.read_text())] == ["train", "validation"]

    shard = output / "train" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    capsys.readouterr()
    assert run(monkeypatch, "prepare_data.py", "--check", output, "--json", report) == EXIT_MISSED
    assert [row["problems"] > 0 for row in json.loads(report.read_text())] == [True, False]
    assert "shard-00001.tar is damaged: chunk 0 at byte 512: the file ends" in capsys.readouterr().out


def test_the_commands_refuse_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    TOKENIZER.save(tmp_path / "tokenizer.model")
    output = ["--output", tmp_path / "data"]
    missing = tmp_path / "none" / "x.json"
    training = ["--input", tmp_path / "bad.txt", "--vocab-size", "500"]
    prepared_with = ["--tokenizer", tmp_path / "tokenizer.model", "--shards", "1", *output]
    for tool, arguments, message in (
        ("train_tokenizer.py", ["--input", tmp_path / "empty", "--vocab-size", "500", *output], "holds no text"),
        ("prepare_data.py", ["--input", tmp_path / "empty", *prepared_with], "holds no text"),
        ("prepare_data.py", ["--input", tmp_path / "bad.txt", *prepared_with], "bad.txt at byte 0 is not valid UTF-8"),
        ("prepare_data.py", ["--input", "stdlib", *output], "--input needs --tokenizer and --output"),
        ("prepare_data.py", ["--check", tmp_path / "data"], "holds no complete data set"),
        ("prepare_data.py", ["--check", tmp_path, "--validation-share", ".1"], "leave out --validation-share"),
        ("prepare_data.py", ["--check", tmp_path, "--tokenizer", "x"], "sets as they are; leave out --tokenizer"),
        ("prepare_data.py", ["--check", tmp_path, "--json", missing], f"cannot write {missing}: No such file or dire"),
        ("prepare_data.py", ["--check", tmp_path, "--json", "s3://bucket/x"], "s3://bucket/x is a URL"),
        ("prepare_data.py", ["--check", tmp_path, "--json", tmp_path], f"cannot write {tmp_path}: it is a folder"),
        ("train_tokenizer.py", [*training, "--output", tmp_path / "bad.txt" / "x"], "bad.txt is not a folder"),
        ("train_tokenizer.py", [*training, "--output", tmp_path], "it is a folder"),
        ("train_tokenizer.py", [*training, "--output", "s3://bucket/x"], "s3://bucket/x is a URL"),
    ):
        assert run(monkeypatch, tool, *arguments) == EXIT_USAGE
        assert message in capsys.readouterr().err
        assert not (tmp_path / "data" / "train").exists()
