"""The viewer: what it prints is what a run reads and predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.programs import run_here

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.finetune.encode import Counts, Encoder
from skvr_dist.data.finetune.examples import QuestionAnswer
from skvr_dist.data.finetune.sequences import FinetuneSequences
from skvr_dist.data.finetune.store import EncodedSet
from skvr_dist.data.prepare.corpus import Corpus, open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.reader import Rows
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.data.view import passages, render

TOKENIZER = train_tokenizer(
    (document for document in open_corpus("stdlib") if document.id.startswith("json/")), vocab_size=500
)
EOS = TOKENIZER.eos_id


def shown(tokens: list[int], separate: bool, ignored: tuple[int, ...] = ()) -> str:
    ids = np.array([tokens])
    labels, ends = ids[:, 1:].copy(), ids[:, :-1] == EOS
    labels[0, list(ignored)] = IGNORED
    if separate:
        labels[ends] = IGNORED
    return render(passages(Rows(ids[:, :-1], labels, np.cumsum(ends, 1) - ends if separate else None), 0, TOKENIZER))


def test_documents_and_what_is_not_predicted_are_marked() -> None:
    first, second, third = (TOKENIZER.encode(text) for text in ("=", "def", "xyz"))
    tokens = [*first, EOS, *second, EOS, *third]
    assert shown(tokens, False) == "[[=]]</s>\n-------- document 1\ndef</s>\n-------- document 2\nxyz"
    assert shown(tokens, True).startswith("[[=]]</s>\n-------- document 1\n[[d")
    lost = tuple(range(len(first), len(first) + len(second) + 1))
    assert shown(tokens, False, ignored=lost) == "[[=]]</s>\n-------- document 1\n[[def]]</s>\n-------- document 2\nxyz"


def test_fine_tuning_shows_answers_bare_and_prompts_in_brackets() -> None:
    examples = [QuestionAnswer((), question, answer, "") for question, answer in (("a?", "yes"), ("b?", "no"))]
    encoded = Encoder(TOKENIZER, longest=61, seed=0, question_first_prob=0.0).encode_all(examples, counts := Counts())
    sequences = FinetuneSequences(EncodedSet.of(encoded, counts), location="", sequence_length=60, eos_id=EOS, seed=0)
    text = render(passages(sequences.read(0, 1), 0, TOKENIZER))
    prompts = {each.question: f"[[Question: {each.question}\nAnswer:]] {each.answer}</s>" for each in examples}
    assert all(prompt in text for prompt in prompts.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    (folder / "source").mkdir()
    for number in range(8):
        (folder / "source" / f"{number}.txt").write_text(f"text number {number} " * 20)
    prepare(Corpus(folder / "source"), TOKENIZER, folder, num_shards=4, workers=1)
    return folder


def test_the_command_prints_what_a_run_reads(data: Path, tmp_path: Path) -> None:
    keys = [
        f"data.train={data}/train",
        f"data.tokenizer={data}/tokenizer.model",
        "data.lanes=4",
        "data.sequence_length=50",
    ]

    def show(*arguments: str, code: int = 0) -> str:
        given = ["--config", "configs/experiment/quickstart.yaml", *keys, *arguments]
        return run_here("tools/show_data.py", *given, code=code)

    printed = show("--first", "3", "--count", "2", "--json", str(tmp_path / "shown.json"))
    assert "======== sequence 3 from train: 50 tokens, 50 of them predicted" in printed
    assert "text number" in printed
    records = json.loads((tmp_path / "shown.json").read_text())
    assert [record["sequence"] for record in records] == [3, 4]
    assert sum(passage["tokens"] for passage in records[0]["passages"]) == 51
    assert "--count 0 must be positive" in show("--count", "0", code=2)
    assert f"--first {10**30} and --count 4 go beyond sequence {10**12}" in show("--first", str(10**30), code=2)
    missing = tmp_path / "none" / "shown.json"
    assert f"cannot write {missing}: No such file or directory" in show("--json", str(missing), code=2)
    TOKENIZER.save(tmp_path / "same.model")
    show("--count", "1", f"data.tokenizer={tmp_path}/same.model")
    train_tokenizer(open_corpus("stdlib", exclude=["[a-m]*"]), vocab_size=500).save(tmp_path / "other.model")
    printed = show("--count", "1", f"data.tokenizer={tmp_path}/other.model", code=2)
    assert "made with" in printed and "give the one beside the data set" in printed
