"""The converted tokenizer gives the training's ids for any text, and the text back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.datasets import write_dataset
from support.tokenizers import (
    STDLIB,
    train_hugging_face,
    train_other,
    train_ours,
    train_unigram,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.tokenizer import convert_tokenizer, write_tokenizer

Pair = tuple[Tokenizer, PreTrainedTokenizerFast]


@pytest.fixture(scope="module", params=[train_ours, train_unigram, train_other, train_hugging_face])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer and its conversion, as AutoTokenizer loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    file = request.param(folder / "training.model")
    write_tokenizer(folder, convert_tokenizer(file, 10**6))
    return load_tokenizer(file), AutoTokenizer.from_pretrained(folder)


def assert_same(pair: Pair, text: str) -> None:
    source, converted = pair
    ids = source.encode(text)
    assert converted(text)["input_ids"] == converted.encode(text) == ids
    assert converted.decode(ids) == converted.decode(ids, skip_special_tokens=True) == text


# Whatever merges could depend on: runs, special names, things that look like bytes, and any character.
PIECES = st.one_of(
    st.sampled_from(
        [" ", "    ", "\n", "\r\n", "\t", "a", "ab", "abab", "=", "==", "def ", "self", "1", "12", "__", "--", ". ,"]
    ),
    st.sampled_from(["é", "e\u0301", "日本", "😀", "\x00", "\ufeff", "\u2581", "\u2585", "\u2047", "\ufffd"]),
    st.sampled_from(["<s>", "</s>", "<unk>", "<pad>", "<|x|>", "<0x0A>", "0x0A"]),
    st.text(max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
@example("")
@example(" ")
@example("  x  </s>")
def test_any_text_has_the_same_ids(pair: Pair, text: str) -> None:
    assert_same(pair, text)


@pytest.mark.parametrize(
    "name", ["textwrap.py", "tokenize.py", "encodings/cp1250.py", "html/entities.py", "json/decoder.py"]
)
def test_source_code_has_the_same_ids(pair: Pair, name: str) -> None:
    assert_same(pair, (STDLIB / name).read_text(encoding="utf-8"))


def test_special_tokens(pair: Pair) -> None:
    source, converted = pair
    assert converted.bos_token_id == converted.eos_token_id == source.eos_id
    assert converted.pad_token_id == (source.eos_id if converted.unk_token_id is None else 0)
    assert converted.encode("a</s>", split_special_tokens=False)[-1] == source.eos_id
    batch = converted(["a", "a b c d"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][0, -1] == 1


def test_unigram_models_of_others_are_refused(tmp_path: Path) -> None:
    refused = r"is a unigram model with user-defined symbols or scores that"
    uneven = train_other(tmp_path / "uneven.model", model_type="unigram", vocab_size=500, user_defined_symbols=[])
    with pytest.raises(UserError, match=rf"uneven.model {refused}"):
        convert_tokenizer(uneven, 128)
    model = ModelProto.FromString(train_unigram(tmp_path / "unigram.model").read_bytes())
    model.pieces[-1].type = ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "symbols.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=rf"symbols.model {refused}"):
        convert_tokenizer(tmp_path / "symbols.model", 128)


def test_models_of_characters_are_refused(tmp_path: Path) -> None:
    file = train_other(tmp_path / "characters.model", model_type="char", user_defined_symbols=[], vocab_size=350)
    with pytest.raises(UserError, match=r"characters.model is of type char, but only bpe and unigram give"):
        convert_tokenizer(file, 128)


def test_models_that_change_texts_are_refused(tmp_path: Path) -> None:
    file = train_other(tmp_path / "prefix.model", add_dummy_prefix=True)
    with pytest.raises(UserError, match=r"prefix.model does not keep texts exact"):
        convert_tokenizer(file, 128)


@pytest.mark.parametrize("train", [train_ours, train_unigram, train_other, train_hugging_face])
def test_data_knows_its_tokenizer_in_either_form(tmp_path: Path, train: Callable[[Path], Path]) -> None:
    """An export that is imported again has the same ids in another file."""
    source = load_tokenizer(train(tmp_path / "training.model"))
    (tmp_path / "exported").mkdir()
    write_tokenizer(tmp_path / "exported", convert_tokenizer(tmp_path / "training.model", 10**6))
    exported = load_tokenizer(tmp_path / "exported")
    assert exported.sha256 != source.sha256
    data = write_dataset(tmp_path / "data/train", [[[300, 301]]], source)
    assert data.is_made_with(source) and not data.is_made_with(exported)  # nothing here says what its ids mean
    source.save(tmp_path / "data/tokenizer.model")
    assert data.is_made_with(exported)
    other = train_other if train is not train_other else train_ours
    assert not data.is_made_with(load_tokenizer(other(tmp_path / "other.model")))
