"""The converted tokenizer gives the training's ids for any text, and the text back."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skvr_dist.data.sources import Document
from skvr_dist.data.tokenizer import Tokenizer, train_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.hf.tokenizer import convert_tokenizer, write_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXT = (STDLIB / "argparse.py").read_text()


def train_ours(file: Path, **options: Any) -> Path:
    documents = [Document(str(number), text) for number, text in enumerate(TEXT.split("\nclass "))]
    train_tokenizer(documents, vocab_size=700, **options).save(file)
    return file


def train_other(file: Path, **options: Any) -> Path:
    """A model of somebody else's that keeps texts exact, with symbols; one of them can be met in no text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        minloglevel=2,
        **{
            "vocab_size": 700,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["\n", "\t", "▁▁▁▁", "ab", "  ", "<|x|>"],
            "control_symbols": ["<pad>"],
            **options,
        },
    )
    file.write_bytes(model.getvalue())
    return file


Pair = tuple[Tokenizer, PreTrainedTokenizerFast]


def train_unigram(file: Path) -> Path:
    return train_ours(file, model_type="unigram")


def train_normalizing(file: Path) -> Path:
    """As Qwen's: texts come back with their accents composed."""
    return train_hugging_face(file, normalizers.NFC())


def train_hugging_face(file: Path, normalizer: Any = None) -> Path:
    """Byte-level BPE with a beginning and an end put around texts, which training does not want."""
    fast = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<unk>", "<s>", "</s>"]
    fast.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=names)
    )
    ends = [(name, fast.token_to_id(name)) for name in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    folder = file.parent / "hf"
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    Tokenizer.load(folder).save(file)
    return file


@pytest.fixture(scope="module", params=[train_ours, train_unigram, train_other, train_hugging_face])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer and its conversion, as AutoTokenizer loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    file = request.param(folder / "training.model")
    write_tokenizer(folder, convert_tokenizer(file, 10**6))
    return Tokenizer.load(file), AutoTokenizer.from_pretrained(folder)


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
