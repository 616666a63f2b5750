"""Fine-tuning sequences: loss on the answers only, every example whole, nothing padded but the rest of a sequence."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.finetune import PROMPT, FinetuneSequences, QuestionAnswer, encode_example, pack, read_examples
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.reader import MicroBatchReader
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError

TOKENIZER = train_tokenizer(
    (document for document in open_corpus("stdlib") if document.id.startswith("json/")), vocab_size=500
)
EOS = TOKENIZER.eos_id
EXAMPLES = [
    QuestionAnswer("def f(x): return x" * (n % 4), f"What is {n}?", f"It is {n * n}." * (n % 3 + 1)) for n in range(40)
]
LENGTH = 120


def sequences_of(examples: list[QuestionAnswer] = EXAMPLES, **options: Any) -> FinetuneSequences:
    return FinetuneSequences(examples, TOKENIZER, **{"sequence_length": LENGTH, "seed": 3, **options})


def test_the_loss_is_on_the_answer_and_its_end() -> None:
    example = QuestionAnswer("The sky.", "Which colour?", "blue")
    (row,) = sequences_of([example]).read(0, 1).tokens
    rows = sequences_of([example]).read(0, 1)
    answered = rows.labels[0] != IGNORED
    assert TOKENIZER.decode(rows.labels[0][answered].tolist()) == " blue"
    assert rows.labels[0][answered][-1] == EOS
    read = TOKENIZER.encode(PROMPT.format(context="The sky.", question="Which colour?")) + TOKENIZER.encode(" blue")
    assert row[: len(read)].tolist() == read
    assert (row[len(read) :] == EOS).all() and not answered[len(read) :].any()


def test_every_example_once_per_epoch_and_whole() -> None:
    sequences = sequences_of()
    encoded = Counter(tuple(encode_example(example, TOKENIZER).tokens.tolist()) for example in EXAMPLES)
    epochs = []
    for epoch in range(2):
        rows = sequences.read(epoch * len(sequences.rows), len(sequences.rows))
        assert rows.documents is not None
        found: Counter[tuple[int, ...]] = Counter()
        for tokens, labels, documents in zip(rows.tokens, rows.labels, rows.documents, strict=True):
            assert (np.diff(documents) >= 0).all()
            for document in range(documents[-1] + 1):
                mine = documents == document
                if (labels[mine] != IGNORED).any():
                    assert labels[mine][-1] == EOS
                    found[(*tokens[mine].tolist(), EOS)] += 1
                else:
                    assert document == documents[-1] and (tokens[mine] == EOS).all()
        assert found == encoded
        epochs.append(rows.tokens.tolist())
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_the_reader_reads_them_like_others() -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "micro_batches_per_step": 4}
    straight = [batch.labels.tolist() for batch in islice(MicroBatchReader(sequences_of(), **options), 12)]
    readers = [
        MicroBatchReader(sequences_of(), **options, replica=r, replicas=2, start_step=1, workers=r) for r in range(2)
    ]
    assert [next(readers[q % 2]).labels.tolist() for q in range(8)] == straight[4:]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50)))
def test_packing_puts_everything_somewhere_and_wastes_little(lengths: list[int]) -> None:
    bins = pack(lengths, 50)
    assert sorted(number for packed in bins for number in packed) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in packed) <= 50 for packed in bins)
    assert len(bins) <= 11 / 9 * max(1, sum(lengths) / 50) * 2 + 1  # twice the volume bound holds for any best fit


def test_examples_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example._asdict()) + "\n" for example in EXAMPLES))
    assert list(read_examples(file)) == EXAMPLES
    for line in ("{", "[]", '{"context": "", "question": "a"}', json.dumps(["", "a", "b"])):
        file.write_text(f'{{"context": "", "question": "a", "answer": "b"}}\n{line}\n')
        with pytest.raises(
            UserError, match=r"examples.jsonl, line 2 is no example; it needs the keys context, question"
        ):
            list(read_examples(file))
    half = json.dumps({"context": "\ud800", "question": "a", "answer": "b"})
    deep = '{"context": "", "question": "a", "answer": "b", "more": ' + "[" * 10**5 + "]" * 10**5 + "}"
    for line, why in ((half, r" \(holds half of a surrogate pair\)"), (deep, "")):
        file.write_text(line)
        with pytest.raises(UserError, match=f"line 1 is no example{why}; it needs"):
            list(read_examples(file))
    lines = "".join(json.dumps({**example._asdict(), "n": "number"}) + "\r\n\r\n" for example in EXAMPLES)
    (tmp_path / "examples.jsonl.gz").write_bytes(
        gzip.compress(codecs.BOM_UTF8 + lines.replace('"number"', "7" * 5000).encode())
    )
    assert list(read_examples(tmp_path / "examples.jsonl.gz")) == EXAMPLES
    file.write_text('{"context": "c", "question": "a", "answer": ""}')
    with pytest.raises(UserError, match="line 1 is no example"):
        list(read_examples(file))
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl: No such file"):
        list(read_examples(tmp_path / "none.jsonl"))


def test_examples_that_do_not_fit_are_refused() -> None:
    long = QuestionAnswer("word " * 200, "a", "b")
    with pytest.raises(UserError, match=r"example 41 has \d+ tokens, more than data.sequence_length 120; shorten"):
        sequences_of([*EXAMPLES, long])
    with pytest.raises(UserError, match="there are no examples to fine-tune on"):
        sequences_of([])


def test_the_fingerprint_follows_the_examples() -> None:
    same = sequences_of().fingerprint()
    assert sequences_of().fingerprint() == same
    others = (sequences_of(seed=4), sequences_of(sequence_length=130), sequences_of(EXAMPLES[1:]))
    assert all(other.fingerprint() != same for other in others)


def test_examples_come_from_a_file_or_a_pipe(tmp_path: Path) -> None:
    for place, kind in (("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"cannot read .*: it is {kind}, not a regular file"):
            list(read_examples(place))
    os.mkfifo(tmp_path / "pipe.jsonl")
    line = json.dumps({"context": "", "question": "a", "answer": "b"})
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.jsonl").write_text(line))
    writer.start()
    assert list(read_examples(tmp_path / "pipe.jsonl")) == [QuestionAnswer("", "a", "b")]
    writer.join()
