"""Fine-tuning sequences: loss on the answers only, every example whole, nothing padded but the rest of a sequence."""

from __future__ import annotations

import json
import os
import shutil
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
from skvr_dist.data.finetune.encode import Counts, Encoder, prompt
from skvr_dist.data.finetune.examples import QuestionAnswer
from skvr_dist.data.finetune.formats import read_examples
from skvr_dist.data.finetune.sequences import FinetuneSequences, pack
from skvr_dist.data.finetune.store import EncodedSet, kept_set
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.reader import MicroBatchReader
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError

TOKENIZER = train_tokenizer(
    (document for document in open_corpus("stdlib") if document.id.startswith("json/")), vocab_size=500
)
EOS = TOKENIZER.eos_id
LENGTH = 120


def example(context: str, question: str, answer: str) -> QuestionAnswer:
    return QuestionAnswer((context,) if context else (), question, answer, "examples.jsonl, line 1")


EXAMPLES = [
    example("def f(x): return x" * (n % 4), f"What is {n}?", f"It is {n * n}." * (n % 3 + 1)) for n in range(40)
]


def encoder(longest: int = LENGTH + 1, seed: int = 3, **options: Any) -> Encoder:
    return Encoder(TOKENIZER, longest=longest, seed=seed, **{"question_first_prob": 0.5, **options})


def sequences_of(examples: list[QuestionAnswer] = EXAMPLES, length: int = LENGTH, seed: int = 3) -> FinetuneSequences:
    encoded = encoder(length + 1, seed).encode_all(examples, counts := Counts())
    kept = EncodedSet.of(encoded, counts)
    return FinetuneSequences(kept, location="examples.jsonl", sequence_length=length, eos_id=EOS, seed=seed)


def test_the_loss_is_on_the_answer_and_its_end() -> None:
    rows = sequences_of([example("The sky.", "Which colour?", "blue")]).read(0, 1)
    (row,) = rows.tokens
    answered = rows.labels[0] != IGNORED
    assert TOKENIZER.decode(rows.labels[0][answered].tolist()) == " blue"
    assert rows.labels[0][answered][-1] == EOS
    texts = [prompt("The sky.", "Which colour?", question_first=first) for first in (False, True)]
    assert texts[0] == "The sky.\n\nQuestion: Which colour?\nAnswer:"
    reads = [TOKENIZER.encode(text) + TOKENIZER.encode(" blue") for text in texts]
    read = next(read for read in reads if read == row[: len(read)].tolist())
    assert (row[len(read) :] == EOS).all() and not answered[len(read) :].any()


def test_every_example_once_per_epoch_and_whole() -> None:
    sequences = sequences_of()
    encoded = Counter(tuple(each.tokens.tolist()) for each in encoder().encode_all(EXAMPLES, Counts()))
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


def test_the_question_stands_where_seed_and_number_say() -> None:
    def starts(**options: Any) -> list[bool]:
        encoded = encoder(400, **options).encode_all([example("def f", "q?", "a")] * 200, Counts())
        return [TOKENIZER.decode(each.tokens[:3].tolist()).startswith("Q") for each in encoded]

    assert starts() == starts() != starts(seed=4)
    assert 75 < sum(starts()) < 125
    assert not any(starts(question_first_prob=0.0)) and all(starts(question_first_prob=1.0))


def test_passages_come_in_several_orders() -> None:
    passages = tuple(f"[{letter}]" for letter in "abcdefgh")
    asked = QuestionAnswer(passages, "q?", "a", "here")
    encoded = list(encoder(400, passage_orders=3, question_first_prob=0.0).encode_all([asked], counts := Counts()))
    texts = [TOKENIZER.decode(each.tokens.tolist()).partition("Question")[0] for each in encoded]
    assert counts.examples == 3 and len(set(texts)) == 3
    assert all(sorted(text.split()) == list(passages) for text in texts)
    [once] = encoder(400, question_first_prob=0.0).encode_all([asked], Counts())
    assert TOKENIZER.decode(once.tokens.tolist()).startswith("[a]\n\n[b]\n\n[c]")


@pytest.mark.parametrize("question_first_prob", [0.0, 1.0])
def test_a_long_context_is_cut_and_nothing_else(question_first_prob: float) -> None:
    words = " ".join(f"word{n}" for n in range(300))
    long = [example(words + " found", "Where?", "found"), example(words, "Where?", "word3"), EXAMPLES[1]]
    encoded = list(encoder(question_first_prob=question_first_prob).encode_all(long, counts := Counts()))
    assert counts.in_words() == (
        "3 examples, 2 of them cut to fit (1 of which lost the answer's text from their context)"
    )
    for each, answer in zip(encoded, (" found", " word3"), strict=False):
        assert LENGTH - 2 <= len(each.tokens) <= LENGTH + 1
        text = TOKENIZER.decode(each.tokens.tolist())
        assert text.endswith(f"Answer:{answer}") and "Question: Where?" in text and "word0 word1" in text
        assert TOKENIZER.decode(each.tokens[each.predicted].tolist()) == answer


def test_examples_that_do_not_fit_are_refused() -> None:
    long = QuestionAnswer(("a",), "b", "word " * 200, "file, line 7")
    with pytest.raises(
        UserError, match=r"file, line 7: question and answer have \d+ tokens, more than data.sequence_length 120, even"
    ):
        sequences_of([*EXAMPLES, long])
    with pytest.raises(UserError, match=r"examples.jsonl holds no examples; give a file with at least one"):
        sequences_of([])


def test_the_fingerprint_follows_the_examples() -> None:
    same = sequences_of().fingerprint
    assert sequences_of().fingerprint == same
    others = (sequences_of(seed=4), sequences_of(length=60), sequences_of(EXAMPLES[1:]))
    assert all(other.fingerprint != same for other in others)


def test_examples_come_from_a_file_or_a_pipe(tmp_path: Path) -> None:
    for place, kind in (("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"cannot read .*: it is {kind}, not a regular file"):
            list(read_examples(place, "examples"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    line = json.dumps({"context": "", "question": "a", "answer": "b"})
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.jsonl").write_text(line))
    writer.start()
    place = f"{tmp_path}/pipe.jsonl, line 1"
    assert list(read_examples(tmp_path / "pipe.jsonl", "examples")) == [QuestionAnswer((), "a", "b", place)]
    writer.join()


def test_tokens_are_kept_for_other_processes(tmp_path: Path) -> None:
    """Made once, the same as without a folder; and anew for another file, or other facts."""
    made: list[str] = []
    file = tmp_path / "examples.jsonl"

    def kept(**facts: Any) -> EncodedSet:
        def make() -> EncodedSet:
            made.append("")
            return EncodedSet.of(encoder().encode_all(EXAMPLES, counts := Counts()), counts)

        return kept_set(tmp_path / "kept", facts, file, make)

    file.write_text("a")
    first, again = kept(seed=1), kept(seed=1)
    assert len(made) == 1 and isinstance(again.tokens, np.memmap)
    plain = sequences_of().examples
    assert again.fingerprint == first.fingerprint == plain.fingerprint and again.counts == plain.counts
    options: dict[str, Any] = {"location": "", "sequence_length": LENGTH, "eos_id": EOS, "seed": 3}
    from_disk, from_memory = (FinetuneSequences(each, **options).read(0, 20) for each in (again, plain))
    assert (from_disk.tokens == from_memory.tokens).all() and (from_disk.labels == from_memory.labels).all()
    kept(seed=2)
    file.write_text("another")
    kept(seed=1)
    assert len(made) == 3
    with pytest.raises(UserError, match=r"cannot read .*absent.jsonl: No such file"):
        kept_set(tmp_path / "kept", {}, tmp_path / "absent.jsonl", lambda: first)
    for name, content in (("tokens.npy", b""), ("ends.npy", b"\x93NUMPY"), ("set.json", b"{}"), ("set.json", b"{")):
        shutil.rmtree(tmp_path / "kept")
        kept(seed=1)
        next((tmp_path / "kept").glob(f"*/{name}")).write_bytes(content)
        with pytest.raises(UserError, match=r"kept/\w+ of data.examples_cache is damaged \(.*\); remove it, to make"):
            kept(seed=1)
