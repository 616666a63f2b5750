"""Answers at smaller caches: what is counted is what greedy decoding gives; and made-up questions to count."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from support.datasets import TOKENIZER
from support.hf_models import random_weights

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.commands import answers, make_retrieval
from skvr_dist.config.load import load_config
from skvr_dist.config.stored import StoredData
from skvr_dist.data.finetune.encode import Counts, Encoded
from skvr_dist.data.finetune.examples import QuestionAnswer
from skvr_dist.data.finetune.formats import read_examples
from skvr_dist.data.finetune.retrieval import LETTERS, needles, recall
from skvr_dist.data.prepare.corpus import Document
from skvr_dist.errors import UserError
from skvr_dist.evaluate.answers import ALL, Asked, Decoding, measure_answers
from skvr_dist.evaluate.generate import generate
from skvr_dist.evaluate.metrics import METRICS
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

ROOT = Path(__file__).parents[2]
LENGTH = 90
STRATEGIES = {"full": CacheStrategy.full(4), "every:4": CacheStrategy.every(4, 4)}


def test_exact_answers_are_those_that_greedy_decoding_gives() -> None:
    """Two answers are what a random model decodes at full retention, one what it does with the first layer's cache."""
    overrides = ["model.num_hidden_layers=4", "model.vocab_size=500", "evaluate.strategies=[full]"]
    config = load_config([ROOT / "configs/experiment/quickstart.yaml"], overrides).model
    decoder = Decoder(config).eval()
    decoder.load_state_dict(random_weights(config), strict=False)
    asked = Asked([], [], Counts())
    for name, question, group in (
        ("full", "which?", "odd"),
        ("every:4", "what is it?", "even"),
        ("full", "who?", "odd"),
    ):
        prompt = torch.tensor(TOKENIZER.encode(question))
        new, _ = generate(decoder, prompt, STRATEGIES[name], max_new_tokens=6)
        answer = TOKENIZER.decode(new.tolist())
        asked.examples.append(QuestionAnswer((), question, "other", "x", (answer,), group))
        tokens = np.array([*prompt.tolist(), *new.tolist()], dtype=np.uint32)
        asked.encoded.append(Encoded(tokens, np.arange(len(tokens)) >= len(prompt)))
    used = {token for encoded in asked.encoded for token in encoded.tokens.tolist()}
    measured = measure_answers(
        decoder,
        asked,
        STRATEGIES,
        eos_id=min(set(range(500)) - used),
        sequence_length=16,
        batch_size=2,
        decode=Decoding(TOKENIZER, 6, METRICS["examples"]),
    )
    points = measured.points
    right = [(point.strategy, point.group, point.answers, point.exact) for point in points]
    assert right == [
        *(("full", ALL, 3, pytest.approx(2 / 3)), ("full", "even", 1, 0.0), ("full", "odd", 2, 1.0)),
        *(("every:4", ALL, 3, pytest.approx(1 / 3)), ("every:4", "even", 1, 1.0), ("every:4", "odd", 2, 0.0)),
    ]
    f1 = [point.scores["F1"].mean for point in points]
    assert f1[2] == f1[4] == 1 and f1[0] < 1
    assert [list(of_strategy) for of_strategy in measured.right.values()] == [[True, False, True], [False, True, False]]
    assert points[0].changes["F1"] == (0, 0, 0)
    assert points[3].changes["exact"].mean == pytest.approx(-1 / 3) and points[3].changes["exact"].low < -0.5
    for strategy, point in zip(STRATEGIES.values(), points[::3], strict=True):
        losses = []
        for encoded in asked.encoded:
            whole = torch.from_numpy(encoded.tokens.astype("int64"))
            logits = decoder(whole[None, :-1], strategy.kv_source_layers)[0, -6:].detach()
            losses.append(torch.nn.functional.cross_entropy(logits, whole[-6:]))
        assert point.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_made_up_questions_are_answered_by_their_contexts() -> None:
    found = list(recall(40, pairs=[4, 8], seed=1))
    assert found == list(recall(40, pairs=[4, 8], seed=1)) != list(recall(40, pairs=[4, 8], seed=2))
    for number, record in enumerate(found):
        pairs = dict(line.split(" = ") for line in record["context"].split("\n"))
        asked = record["question"]
        assert len(pairs) == (4, 8)[number % 2] and record["answer"] == f"{asked} = {pairs[asked]}"
        part = list(pairs).index(asked) * 4 // len(pairs)
        assert record["group"] == f"{len(pairs):3} pairs, part {part + 1} of 4"
    first, second, *others = recall(8, pairs=[2, 8], asked=6, seed=1)
    for single in (first, second):
        assert single["answer"].startswith(f"{single['question']} = ") and "\n" not in single["answer"]
    for record in others:
        lines, answer = record["context"].split("\n"), record["answer"].split("\n")
        name = record["question"].removesuffix(" and others")
        assert answer[0].startswith(f"{name} = ") and name != record["question"]
        assert record["group"] == f"{len(lines):3} pairs"
        assert sorted(Counter(answer)[line] for line in lines) == ([3, 3] if len(lines) == 2 else [0, 0, *[1] * 6])
    letters = list(recall(20, pairs=[2, 26], seed=1, written=LETTERS))
    assert all(re.fullmatch(r"[A-Z][0-9]", record["answer"]) for record in letters)
    assert all(record["answer"] in re.findall("..", record["context"]) for record in letters)
    text = "\n".join(f"line {n}" for n in range(500))
    for record in needles(10, filler=text, characters=200, depths=[0, 1], seed=0):
        lines = record["context"].split("\n")
        assert f"is {record['answer']}." in lines[0 if record["group"] == "depth   0 %" else -1]
    with pytest.raises(UserError, match=r"the filler has 5 characters, too few for contexts of 200; give twice"):
        list(needles(1, filler="short", characters=200, depths=[0], seed=0))
    with pytest.raises(UserError, match=r"9999 pairs are more than there are names; at most 4900"):
        list(recall(1, pairs=[9999], seed=0))


SQUAD, OTHER = ({"path": "x", "format": form} for form in ("squad", "examples"))
LAST = {"question_first_prob": 0.0}


@pytest.mark.parametrize(
    ("train", "given", "asked"),
    [
        ({"qa": {**SQUAD, **LAST}, "text": {"path": "y"}, "chats": {"path": "z", "format": "chat"}}, None, 0.0),
        ({"qa": {**SQUAD, **LAST}, "b": OTHER}, None, 0.0),
        ({"b": {**OTHER, **LAST}}, None, 0.0),
        ({"qa": SQUAD}, 0.0, 0.0),
        ("data/stdlib/train", None, 0.5),
        (None, None, 0.5),
    ],
)
def test_questions_stand_where_they_stood_in_training(
    train: dict[str, dict[str, object]] | str | None, given: float | None, asked: float
) -> None:
    data = StoredData.model_validate({"train": train})
    checkpoint = cast("Checkpoint", SimpleNamespace(config=SimpleNamespace(data=data)))
    options = argparse.Namespace(question_first_prob=given, format="squad")
    assert answers.questions_first(options, checkpoint) == asked


def test_a_place_of_questions_that_cannot_be_known() -> None:
    data = StoredData.model_validate({"train": {"qa": {**SQUAD, **LAST}, "more": SQUAD}})
    checkpoint = cast("Checkpoint", SimpleNamespace(config=SimpleNamespace(data=data)))
    with pytest.raises(UserError, match=r"qa has question_first_prob 0, but more has 0.5; say with --question-first"):
        answers.questions_first(argparse.Namespace(question_first_prob=None, format="squad"), checkpoint)
    with pytest.raises(UserError, match="--format code has no questions and contexts; leave out --question-first"):
        answers.questions_first(argparse.Namespace(question_first_prob=0.5, format="code"), checkpoint)


def test_a_filler_of_short_documents_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    class Text(str):
        def __len__(self) -> int:
            measured.append("")
            return super().__len__()

    documents = [Document(str(number), Text("ab")) for number in range(100)]
    monkeypatch.setattr("skvr_dist.data.prepare.corpus.open_corpus", lambda _: documents)
    assert make_retrieval._beginning("") == "\n".join(["ab"] * 100)
    assert len(measured) <= len(documents)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "needle.jsonl"
    words = ["needle", "--filler", "stdlib", "--count", "6", "--depths", "0.5", "--output", str(file)]

    def started(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["skvr-make-retrieval", *words])
        make_retrieval.run()
        return capsys.readouterr().out

    assert f"written: {file}, 6 examples" in started(*words)
    assert [example.group for example in read_examples(file, "examples") if isinstance(example, QuestionAnswer)] == [
        "depth  50 %"
    ] * 6
    assert len(json.loads(file.read_text().splitlines()[0])["context"]) > 1500
    for wrong, sentence in (
        (["recall", "--letters", "--pairs", "27"], "27 pairs are more than there are names; at most 26"),
        (["needle", "--filler", "stdlib", "--letters"], "--letters is for recall alone; leave it out for needle"),
        (["recall", "--depths", "0.5"], "--depths is for needle alone; leave it out for recall"),
        (["needle"], "needles need other text to be hidden in; give --filler CORPUS"),
        (["needle", "--depths", "2"], "--depths 2.0 is no share of a context; give numbers from 0 to 1"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            started(*wrong, "--output", str(file))
    monkeypatch.setattr(sys, "argv", ["skvr-answers", "x", "y", "--format", "chat", "--decode", "3"])
    with pytest.raises(UserError, match="--decode needs one answer per example, but chats have several"):
        answers.run()
