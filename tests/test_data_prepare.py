"""Data sets on disk: the same bytes however they are made, nothing half made, no damage unseen."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from skvr_dist.data.prepare import prepare
from skvr_dist.data.shards import Dataset, check_dataset, find_datasets, smallest_token_type
from skvr_dist.data.sources import Document, document_fraction, open_corpus
from skvr_dist.data.tokenizer import Tokenizer, train_tokenizer
from skvr_dist.data.writer import DatasetWriter
from skvr_dist.errors import EXIT_MISSED, EXIT_USAGE, UserError

DOCUMENTS = [document for document in open_corpus("stdlib") if document.id.startswith(("json/", "email/", "xml/"))]
TOKENIZER = train_tokenizer(DOCUMENTS, vocab_size=500)
TOOLS = Path(__file__).parent.parent / "tools"


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    prepare(DOCUMENTS, TOKENIZER, output, num_shards=4, validation_share=0.3, workers=1)
    return output


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_every_document_is_in_one_data_set(prepared: Path) -> None:
    found: dict[str, str] = {}
    for split, dataset in find_datasets(prepared).items():
        for index in range(len(dataset.manifest.shards)):
            tokens, offsets = dataset.read_shard(index)
            for start, end in pairwise(offsets):
                assert tokens[end - 1] == TOKENIZER.eos_id
                found[TOKENIZER.decode(tokens[start : end - 1].tolist())] = split
    held_out = [document for document in DOCUMENTS if document_fraction(document.id, "validation") < 0.3]
    assert 0 < len(held_out) < len(DOCUMENTS)
    assert found == {d.text: "validation" if d in held_out else "train" for d in DOCUMENTS}


def test_the_manifest_counts(prepared: Path) -> None:
    for dataset in find_datasets(prepared).values():
        manifest = dataset.manifest
        assert manifest.token_type == "uint16"
        assert manifest.vocab_size == 500
        assert manifest.tokenizer_sha256 == TOKENIZER.sha256
        sizes = [shard.tokens for shard in manifest.shards]
        assert sum(sizes) == manifest.tokens
        assert max(sizes) < 1.5 * min(sizes)
        assert check_dataset(dataset) == []
    assert Tokenizer.load(prepared / "tokenizer.model").sha256 == TOKENIZER.sha256


def test_webdataset_reads_the_shards(prepared: Path) -> None:
    dataset = Dataset.open(prepared / "train")
    paths = [str(dataset.folder / shard.file) for shard in dataset.manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(samples) == dataset.manifest.documents
    tokens = np.concatenate([np.frombuffer(sample["tokens"], dtype="<u2") for sample in samples])
    np.testing.assert_array_equal(tokens, np.concatenate([dataset.read_shard(i).tokens for i in range(len(paths))]))
    assert "json/decoder.py".replace("/", "%2F").replace(".", "%2E") in [sample["__key__"] for sample in samples]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_changes_nothing(
    prepared: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skvr_dist.data.prepare._BATCH_CHARS", 20_000)
    prepare(DOCUMENTS, TOKENIZER, tmp_path, num_shards=4, validation_share=0.3, workers=workers)
    assert all_bytes(tmp_path) == all_bytes(prepared)


def test_odd_document_names(tmp_path: Path) -> None:
    names = ["__init__", "a.b.c/d", "a" * 300, "ümlaut %2E", "__meta__/x", "not \udcff UTF-8"]
    prepare([Document(name, "text") for name in names], TOKENIZER, tmp_path, num_shards=1, workers=1)
    assert len(Dataset.open(tmp_path / "train").read_shard(0).offsets) == len(names) + 1


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [smallest_token_type(n) for n in (65_536, 65_537)] == ["uint16", "uint32"]
    monkeypatch.setattr(Tokenizer, "vocab_size", 65_537)
    with DatasetWriter(tmp_path / "large", num_shards=1, tokenizer=TOKENIZER) as writer:
        writer.write("a", [65_536, 2], text_bytes=1)
        writer.finish(corpus_sha256="", validation_share=0.0)
        writer.publish()
    assert Dataset.open(tmp_path / "large").read_shard(0).tokens.tolist() == [65_536, 2]


def test_preparing_again_is_quick_or_refused(prepared: Path) -> None:
    before = all_bytes(prepared)

    def again(documents: list[Document] = DOCUMENTS, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> bool:
        options = {"num_shards": 4, "validation_share": 0.3, **options}
        return prepare(documents, tokenizer, prepared, **options).written

    assert not again()
    with pytest.raises(UserError, match=r"made with corpus \w{12}, not \w{12}; remove it or choose another output"):
        again([*DOCUMENTS[1:], Document(DOCUMENTS[0].id, "changed")])
    with pytest.raises(UserError, match="made with number of shards 4, not 5;"):
        again(num_shards=5)
    with pytest.raises(UserError, match=r"made with validation share 0\.3, not 0\.0;"):
        again(validation_share=0.0)
    other = train_tokenizer(DOCUMENTS, vocab_size=501)
    with pytest.raises(UserError, match=rf"made with tokenizer {TOKENIZER.sha256[:12]}, not {other.sha256[:12]};"):
        again(tokenizer=other)
    assert all_bytes(prepared) == before


def test_an_interrupted_run_does_not_look_complete(tmp_path: Path, prepared: Path) -> None:
    def interrupted() -> Iterator[Document]:
        yield from DOCUMENTS[:10]
        # what a killed process leaves behind, seen before anything can tidy up
        shutil.copytree(tmp_path / "train.partial", tmp_path / "killed" / "train.partial")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), TOKENIZER, tmp_path, num_shards=4, validation_share=0.3, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "tokenizer.model"]
    with pytest.raises(UserError, match="holds no complete data set"):
        find_datasets(tmp_path / "killed")
    with pytest.raises(UserError, match="holds no complete data set"):
        Dataset.open(tmp_path / "killed" / "train.partial")
    prepare(DOCUMENTS, TOKENIZER, tmp_path / "killed", num_shards=4, validation_share=0.3, workers=1)
    assert all_bytes(tmp_path / "killed") == all_bytes(prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 200}, r"train would have \d+ documents for 200 shards; ask for fewer"),
        ({"num_shards": 0}, "--shards 0 and --workers 1 must be positive"),
        ({"num_shards": 1, "workers": 0}, "--shards 1 and --workers 0 must be positive"),
        ({"num_shards": 1, "validation_share": 1.0}, "--validation-share 1.0 must be at least 0 and below 1"),
        ({"num_shards": 1, "validation_share": 1e-9}, "validation would have 0 documents for 1 shards"),
    ],
)
def test_impossible_requests_leave_no_data_set(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(DOCUMENTS, TOKENIZER, tmp_path, **{"workers": 1, **options})
    assert set(all_bytes(tmp_path)) <= {"tokenizer.model"}


def test_another_tokenizer_in_the_output_is_refused(tmp_path: Path) -> None:
    train_tokenizer(DOCUMENTS, vocab_size=501).save(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model holds another tokenizer"):
        prepare(DOCUMENTS, TOKENIZER, tmp_path, num_shards=1, workers=1)


def test_a_folder_of_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-00000.tar").write_text("precious")
    with pytest.raises(UserError, match=r"train is there already; remove it or choose another output"):
        prepare(DOCUMENTS, TOKENIZER, tmp_path, num_shards=1, workers=1)
    assert (tmp_path / "train" / "shard-00000.tar").read_text() == "precious"


# Damage. `edit_manifest` lets a damage through the tests that come before the one it is meant for.


def edit_manifest(folder: Path, **shard: Any) -> None:
    """Change facts of the first shard, and the totals with them."""
    tree = json.loads((folder / "manifest.json").read_text())
    for key, value in shard.items():
        if key in ("documents", "tokens"):
            tree[key] += value - tree["shards"][0][key]
        tree["shards"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(tree))


def replace_shard(folder: Path, data: bytes, **facts: Any) -> None:
    (folder / "shard-00000.tar").write_bytes(data)
    edit_manifest(folder, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **facts)


def tar_of(tmp_path: Path, *members: bytes) -> bytes:
    with tarfile.open(tmp_path / "made.tar", "w") as tar:
        for number, data in enumerate(members):
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", f"{number}.tokens")
    return (tmp_path / "made.tar").read_bytes()


def test_a_missing_or_truncated_shard_is_refused(copy: Path) -> None:
    shard = copy / "train" / "shard-00002.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    with pytest.raises(UserError, match=rf"shard .*shard-00002.tar has {size // 2} bytes, .* names {size} bytes; copy"):
        Dataset.open(copy / "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard .*shard-00002.tar is missing"):
        Dataset.open(copy / "train")


def test_damaged_shards_are_named(copy: Path, tmp_path: Path) -> None:
    folder = copy / "train"
    whole = (folder / "shard-00000.tar").read_bytes()

    def refusal() -> str:
        with pytest.raises(UserError, match=r"shard .*train/shard-00000.tar is damaged: ") as caught:
            Dataset.open(folder).read_shard(0)
        return str(caught.value)

    flipped = bytearray(whole)
    flipped[1000] ^= 1
    (folder / "shard-00000.tar").write_bytes(flipped)
    assert "do not have the checksum that the manifest names" in refusal()
    replace_shard(folder, whole[:700])
    assert "it is no readable tar file (ReadError)" in refusal()
    replace_shard(folder, tar_of(tmp_path, b"\1\0\2\0", b"\1\0\2"), documents=2, tokens=3)
    assert "member 1.tokens has 3 bytes, which are no uint16s" in refusal()
    replace_shard(folder, tar_of(tmp_path, b"\1\0\2\0"), documents=2, tokens=2)
    assert "it holds 1 documents, but the manifest names 2" in refusal()
    replace_shard(folder, tar_of(tmp_path, b"\1\0\2\0"), documents=1, tokens=3)
    assert "it holds 2 tokens, but the manifest names 3" in refusal()
    replace_shard(folder, tar_of(tmp_path, b"\xff\xff\2\0"), documents=1, tokens=2)
    assert "it holds token 65535, outside the vocabulary of 500" in refusal()
    replace_shard(folder, tar_of(tmp_path, b"\2\0\7\0"), documents=1, tokens=2)
    (problem,) = check_dataset(Dataset.open(folder))
    assert "1 documents do not end with token 2" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not the manifest of a data set"),
        ('{"shards": []}', "manifest.json is not the manifest of a data set"),
        ('{"format_version": 9}', "has format version 9, but this version of skvr_dist reads 1"),
        ('{"format_version": 1}', "manifest.json is not valid: token_type: Field required"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Dataset.open(tmp_path)


def test_a_manifest_that_contradicts_itself_is_refused(copy: Path) -> None:
    tree = json.loads((copy / "train" / "manifest.json").read_text())
    for key, value, message in (
        ("tokens", tree["tokens"] + 1, rf"tokens is {tree['tokens'] + 1}, but the shards hold {tree['tokens']}"),
        ("vocab_size", 65_537, "vocab_size 65537 does not fit token_type uint16"),
    ):
        (copy / "train" / "manifest.json").write_text(json.dumps({**tree, key: value}))
        with pytest.raises(UserError, match=f"manifest.json is not valid: {message}; copy it again"):
            Dataset.open(copy / "train")


def test_models_and_data_sets_that_do_not_fit_are_refused(prepared: Path, tmp_path: Path) -> None:
    train = Dataset.open(prepared / "train")
    train.require_vocabulary(500)
    with pytest.raises(UserError, match=r"has a vocabulary of 500, but model\.vocab_size is 499"):
        train.require_vocabulary(499)
    train.require_same_tokenizer(Dataset.open(prepared / "validation"))
    other = train_tokenizer(DOCUMENTS, vocab_size=501)
    made = prepare(DOCUMENTS, other, tmp_path, num_shards=1, workers=1).datasets["train"]
    with pytest.raises(UserError, match=rf"tokenizer {TOKENIZER.sha256[:12]}, but .* with {other.sha256[:12]}"):
        train.require_same_tokenizer(made)


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
    assert [row["damaged_shards"] for row in json.loads(report.read_text())] == [1, 0]
    assert "shard-00001.tar is damaged: its 5000 bytes do not have the checksum" in capsys.readouterr().out


def test_the_commands_refuse_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    TOKENIZER.save(tmp_path / "tokenizer.model")
    output = ["--output", tmp_path / "data"]
    prepared_with = ["--tokenizer", tmp_path / "tokenizer.model", *output]
    for tool, arguments, message in (
        ("train_tokenizer.py", ["--input", tmp_path / "empty", "--vocab-size", "500", *output], "holds no text"),
        ("prepare_data.py", ["--input", tmp_path / "empty", *prepared_with], "holds no text"),
        ("prepare_data.py", ["--input", tmp_path / "bad.txt", *prepared_with], "bad.txt is not valid UTF-8 at byte 0"),
        ("prepare_data.py", ["--input", "stdlib", *output], "--input needs --tokenizer and --output"),
        ("prepare_data.py", ["--check", tmp_path / "data"], "holds no complete data set"),
    ):
        assert run(monkeypatch, tool, *arguments) == EXIT_USAGE
        assert message in capsys.readouterr().err
        assert set(all_bytes(tmp_path)) - {"bad.txt", "tokenizer.model"} <= {"data/tokenizer.model"}
