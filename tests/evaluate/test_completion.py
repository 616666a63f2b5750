"""Completing lines of held-out documents: which lines are asked for, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.datasets import TOKENIZER

from skvr_dist.config.model import ModelConfig
from skvr_dist.data.prepare.corpus import Document, hash_fraction
from skvr_dist.errors import UserError
from skvr_dist.evaluate.completion import (
    asked_lines,
    edit_similarity,
    ends_of_line,
    held_out_lines,
    same_words,
)
from skvr_dist.evaluate.generate import decode_all, generate
from skvr_dist.lab.verify.cases import Case
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.routing import CacheStrategy

TEXTS = ["\n".join(f"value_{name}_{n} = {n}" for n in range(20)) + "\n# done\n" for name in range(40)]
DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]


def test_lines_are_of_held_out_documents_alone() -> None:
    lines = list(held_out_lines(DOCUMENTS, 0.3, 30))
    held_out = {each.id for each in DOCUMENTS if hash_fraction(each.text, "validation") < 0.3}
    assert {line.document for line in lines} == held_out and len(lines) == 30
    shares = [sum(line.document == name for line in lines) for name in held_out]
    assert max(shares) - min(shares) <= 1
    for line in lines:
        text = TEXTS[int(line.document)]
        assert text.startswith(line.before + line.text + "\n") and line.before.count("\n") == line.number - 1 >= 8
    assert len(set(lines)) == 30 and lines == list(held_out_lines(DOCUMENTS, 0.3, 30))
    with pytest.raises(UserError, match=r"no line can be completed: of the corpus 0 documents are held out at"):
        list(held_out_lines(DOCUMENTS[:1], 1e-9, 5))


def test_a_line_is_predicted_with_its_end_after_what_fits() -> None:
    lines = list(held_out_lines(DOCUMENTS, 0.3, 5))
    asked = asked_lines(lines, TOKENIZER, 64, 24)
    for line, encoded in zip(lines, asked.encoded, strict=True):
        # The end of the line before is predicted too: it may be one token with the indentation.
        assert TOKENIZER.decode(encoded.tokens[encoded.predicted].tolist()) == f"\n{line.text}\n"
        assert line.before.endswith(TOKENIZER.decode(encoded.tokens[~encoded.predicted].tolist()) + "\n")
        assert (~encoded.predicted).sum() == 64 - 24
    assert all("\n" in TOKENIZER.decode([token]) for token in ends_of_line(TOKENIZER))
    with pytest.raises(UserError, match="--decode 64 leaves no room to read in 64 tokens; give less"):
        asked_lines(lines, TOKENIZER, 64, 64)
    with pytest.raises(UserError, match="every line has more than --decode 1 tokens; give more"):
        asked_lines(lines, TOKENIZER, 64, 1)


def test_scores_of_code_completion() -> None:
    """Values of CodeXGLUE's evaluator: `split` of both for the match, `fuzz.ratio` (here unrounded) of rapidfuzz."""
    assert same_words("    return  x\nmore", "return x") == 1 and same_words("return y", "return x") == 0
    assert edit_similarity("return y\n", "    return x") == pytest.approx(0.875)
    assert edit_similarity("for i in range(n):", "for key in range(3):") == pytest.approx(0.8421052631578947)
    assert edit_similarity("", "x") == 0
    assert same_words("\n    return x\n    more", "    return x") == 1


def test_decoding_ends_with_the_line() -> None:
    """At a token that ends lines, once there is another; those that a line begins with do not end it."""

    class Scripted:
        def __init__(self, tokens: list[int]) -> None:
            self.tokens = iter(tokens)

        def __call__(self, *_: object) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[next(self.tokens)]]), 9).float()

    for script, given in (([7, 1, 2, 8, 3], [7, 1, 2, 8]), ([1, 7, 2], [1, 7]), ([7, 8, 1, 1, 1], [7, 8, 1, 1, 1])):
        decoder: Any = Scripted(script)
        new, _ = generate(decoder, torch.tensor([0]), CacheStrategy.full(2), max_new_tokens=5, last_tokens={7, 8})
        assert new.tolist() == given


def test_decoding_ends_where_the_model_can_read_no_further() -> None:
    shape = Case("single").shape | {"max_position_embeddings": 12, "vocab_size": TOKENIZER.vocab_size}
    decoder = Decoder(ModelConfig.model_validate(shape))
    initialize(decoder, seed=0)
    strategy = CacheStrategy.full(decoder.config.num_hidden_layers)
    prompts = [torch.arange(length) for length in (3, 10)]
    texts = decode_all(decoder, prompts, strategy, TOKENIZER, max_new_tokens=20, stop_tokens=[], name="full")
    for prompt, text in zip(prompts, texts, strict=True):
        new, _ = generate(decoder, prompt, strategy, max_new_tokens=12 - len(prompt))
        assert text == TOKENIZER.decode(new.tolist())
