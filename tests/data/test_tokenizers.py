"""The tokenizer: exact for any text, the same for the same documents, thrifty with indentation."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken

from skvr_dist.data.prepare.corpus import Document, open_corpus
from skvr_dist.data.tokenizers import sentencepiece as sentencepiece_module
from skvr_dist.data.tokenizers import train as training_module
from skvr_dist.data.tokenizers.hugging_face import HuggingFaceTokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer, tokenizer_from_bytes
from skvr_dist.data.tokenizers.train import ModelType, train_tokenizer
from skvr_dist.errors import UserError

CODE = [document for document in open_corpus("stdlib") if document.id.startswith("json/")]
TOKENIZERS = {kind: train_tokenizer(CODE, vocab_size=600, model_type=kind) for kind in ("bpe", "unigram")}

# Any Unicode, and the characters that sentencepiece treats in a way of its own, more often than chance would.
SPECIAL = st.sampled_from(
    ["\n", " ", "    ", "\t", "\r\n", "\0", "\u2581", "\u2585", "<s>", "<unk>", "<0x0A>", "def x", "7"]
)
TEXTS = st.lists(SPECIAL | st.text(), max_size=20).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(text=TEXTS)
def test_every_text_comes_back(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < i < tokenizer.vocab_size for i in ids)  # no <unk>, <s> or </s>, not even for their names


@settings(deadline=None)
@given(text=TEXTS, stretch_chars=st.integers(1, 10))
def test_long_texts_are_encoded_in_stretches_without_a_trace(text: str, stretch_chars: int) -> None:
    tokenizer = TOKENIZERS["bpe"]
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_module, "_STRETCH_CHARS", stretch_chars)
        assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_indentation_costs_one_token(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for text in ("\n", "\n    ", "\n        ", "        "):
        assert len(tokenizer.encode(text)) == 1, text
    assert len(tokenizer.encode("\t")) == 1
    assert len(tokenizer.encode("123")) == 3


def test_ids_and_special_tokens() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.vocab_size == 600
    assert tokenizer.eos_id == 2
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2]) == "text"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_does_not_depend_on_the_order_of_documents(kind: ModelType) -> None:
    again = train_tokenizer(reversed(CODE), vocab_size=600, model_type=kind)
    assert again.model == TOKENIZERS[kind].model


def test_a_large_corpus_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "TRAINING_CHARS", 20_000)
    lines = [Document(str(i), line) for i, line in enumerate("".join(d.text for d in CODE).splitlines())]
    sampled = train_tokenizer(lines, vocab_size=400)
    assert sampled.model == train_tokenizer(reversed(lines), vocab_size=400).model
    long_line = Document("long", "word " * 100_000)
    assert train_tokenizer([*lines, long_line], vocab_size=400).vocab_size == 400


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_vocabulary_that_cannot_be_is_refused(kind: ModelType) -> None:
    for size in (-5, 0, 259, 10**8, 10**30):
        with pytest.raises(
            UserError, match=rf"a vocabulary of {size} pieces cannot be: it has at least 260, for 256 b"
        ):
            train_tokenizer(CODE, vocab_size=size, model_type=kind)
    short = [Document("a", "a b c")]
    for size, message in (
        (261, r"the characters of the documents need at least (\d+)"),
        (400, r"the documents give at most (\d+); ask for fewer or give more documents"),
        (10**7, r"the documents give at most (\d+); ask"),
    ):
        with pytest.raises(
            UserError, match=rf"^sentencepiece cannot train a vocabulary of {size} pieces: {message}"
        ) as refused:
            train_tokenizer(short, vocab_size=size, model_type=kind)
        possible = int(re.findall(r"(?:least|most) (\d+)", str(refused.value))[0])
        assert train_tokenizer(short, vocab_size=possible, model_type=kind).vocab_size == possible
    with pytest.raises(UserError, match="learns nothing from documents of tabs and NUL characters"):
        train_tokenizer([Document("a", "\t\0\t")], vocab_size=300, model_type=kind)


def unspaced(seed: int, sentences: int, chars: str) -> str:
    """Sentences without spaces, of words by Zipf's law."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(chars, k=draw.choice((1, 2, 2, 3)))) for _ in range(400)]
    weights = [1 / (n + 3) for n in range(len(words))]
    return "".join(
        "".join(draw.choices(words, weights, k=draw.randint(6, 20))) + "。" + "\n" * (n % 7 == 0)
        for n in range(sentences)
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("first", "letters"), [("\u4e00", 150), ("\u0e01", 46)], ids=["chinese", "thai"])
def test_scripts_without_spaces_get_their_share(
    kind: ModelType, first: str, letters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As few tokens as when training looks at all chunks, however many Latin words come before them by count."""
    characters = "".join(chr(ord(first) + n) for n in range(letters))
    draw = random.Random(1)
    latin = "".join(f"{draw.getrandbits(16):x} " * 3 for _ in range(8_000))
    documents = [Document("latin", latin), Document("other", unspaced(2, 2000, characters))]
    held_out = unspaced(2, 2100, characters)[-2000:]
    lengths = []
    for chunks in (10, 10**6):
        monkeypatch.setattr(training_module, "_CHUNKS_PER_PIECE", chunks)
        lengths.append(len(train_tokenizer(documents, vocab_size=600, model_type=kind).encode(held_out)))
    assert lengths[0] <= 1.1 * lengths[1]


def test_a_paragraph_longer_than_sentencepiece_takes_is_learned_from() -> None:
    text = unspaced(3, 4000, "".join(map(chr, range(0x4E00, 0x4E00 + 100)))).replace("\n", "")
    lines = text.replace("。", "。\n")
    one, many = (train_tokenizer([Document("a", form)], vocab_size=500) for form in (text, lines))
    assert len(one.encode(text[:2000])) <= 1.05 * len(many.encode(text[:2000]))


def test_nul_characters_hide_no_words() -> None:
    separated = train_tokenizer([Document("a", "\0".join(f"word{n % 50}" for n in range(1000)))], vocab_size=275)
    assert len(separated.encode("word1")) < len("word1")


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(data=st.binary())
def test_arbitrary_bytes_come_back(kind: str, data: bytes) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text)).encode("latin-1") == data
    assert tokenizer.decode([3 + byte for byte in text.encode()]) == text  # the pieces of bytes


def test_unigram_scores_add_up_exactly() -> None:
    """In single as in double precision, so that transformers finds the same tokens."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZERS["unigram"].model)
    scores = [piece.score for piece in model.pieces]
    assert all((score * 128).is_integer() for score in scores)
    assert len(set(scores)) > 100


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Hugging Face stores it."""
    folder = tmp_path_factory.mktemp("hf")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>", "<s>"], show_progress=False
    )
    trained.train_from_iterator([document.text for document in CODE], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>").save_pretrained(folder)
    return folder


@settings(deadline=None)
@given(text=TEXTS)
@example(text="a<|end|>b")
def test_hugging_face_tokenizers(hf_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == 0
    assert not {0, 1} & set(ids)  # names of special tokens are just text
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert all(i < tokenizer.vocab_size for i in ids)


def test_hugging_face_tokenizers_become_one_file(hf_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf_folder / "tokenizer.json")
    tokenizer.save(tmp_path / "tokenizer.model")
    again = load_tokenizer(tmp_path / "tokenizer.model")
    assert again.sha256 == tokenizer.sha256 == load_tokenizer(hf_folder).sha256
    assert (again.vocab_size, again.eos_id) == (500, 0)
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"cannot read tokenizer .*: No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    for config, message in (
        ("{}", "tokenizer_config.json names no eos_token"),
        ('{"eos_token": "<none>"}', "has no token '<none>', which its configuration names as the eos_token"),
        ("[", "tokenizer.json is not a Hugging Face tokenizer"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / "tokenizer.json")
    shutil.copy(hf_folder / "tokenizer_config.json", tmp_path)
    for content, message in (
        ('{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', r"is not a Hugging Face tokenizer \("),
        ('{"model": ' + "[" * 10**5 + "]" * 10**5 + "}", "is not a Hugging Face tokenizer: it or its configuration"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json: it is a named pipe"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_text('{"eos_token": "a", "tokenizer": {}}')
    with pytest.raises(UserError, match=r"broken.model is not a Hugging Face tokenizer \("):
        load_tokenizer(tmp_path / "broken.model")


def test_settings_of_training_are_off(hf_folder: Path, tmp_path: Path) -> None:
    """Dropout, truncation and padding, which a tokenizer.json may hold: the tokens depend on the text alone."""
    text = CODE[0].text
    expected = load_tokenizer(hf_folder).encode(text)
    shutil.copytree(hf_folder, tmp_path, dirs_exist_ok=True)
    trained = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    trained.model.dropout = 0.5
    trained.enable_truncation(7)
    trained.enable_padding(length=100)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert json.loads(tokenizer.model)["tokenizer"]["model"]["dropout"] == 0.5  # the file stays what was given
    for used in (tokenizer, tokenizer_from_bytes(tokenizer.model)):
        assert used.encode(text) == expected
        assert used.encode("") == []
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.for_export().encode(text).ids == expected


UNIGRAM = tokenizers.models.Unigram([("<unk>", 0), ("<s>", 0), ("</s>", 0), *((c, -1) for c in "▁ab</s>")], unk_id=0)
WORDS = tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>")
CHARACTERS = tokenizers.models.BPE(vocab={c: number for number, c in enumerate("ab</s>")}, merges=[])


@pytest.mark.parametrize(
    ("model", "divide", "added"),
    [
        (UNIGRAM, tokenizers.pre_tokenizers.Metaspace(), [AddedToken(name, special=True) for name in ("<s>", "</s>")]),
        (WORDS, tokenizers.pre_tokenizers.WhitespaceSplit(), []),
        (CHARACTERS, None, [AddedToken("</s>", special=False)]),
    ],
)
def test_names_in_a_text_end_no_document(model: Any, divide: Any, added: list[AddedToken]) -> None:
    """Names that are in the vocabulary of the model, or of tokens that are not called special."""
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = divide
    fast.add_tokens(added)
    content = {"eos_token": "</s>", "tokenizer": json.loads(fast.to_str())}
    tokenizer = tokenizer_from_bytes(json.dumps(content).encode())
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    exported = tokenizer.for_export()
    exported.encode_special_tokens = True
    for text in ("a </s> b", "</s>", "a<s>b</s></s>", "</s>b"):
        ids = tokenizer.encode(text)
        assert ids and not {tokenizer.eos_id, fast.token_to_id("<s>")} & set(ids)
        assert exported.encode(text).ids == ids
    assert tokenizer.encode_with_offsets("a</s>")[0][-1] == tokenizer.eos_id


def test_a_text_that_a_tokenizer_has_no_token_for_is_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "a": 1}, unk_token="<none>"))
    content = {"eos_token": "<end>", "tokenizer": json.loads(words.to_str())}
    tokenizer = tokenizer_from_bytes(json.dumps(content).encode(), "words.model")
    assert tokenizer.encode("a") == [1]
    with pytest.raises(UserError, match=r"words.model cannot encode a text \(WordLevel error: Missing \[UNK\]"):
        tokenizer.encode("b")


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer, file = TOKENIZERS["bpe"], tmp_path / "folder" / "tokenizer.model"
    tokenizer.save(file)
    tokenizer.save(file)
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(file).sha256 == tokenizer.sha256
    with pytest.raises(UserError, match=r"tokenizer.model holds another tokenizer; remove it or choose another name"):
        TOKENIZERS["unigram"].save(file)
    assert load_tokenizer(file).sha256 == tokenizer.sha256


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"cannot read tokenizer {tmp_path}: No such file.*{tmp_path}/tokenizer.json\)"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot read /dev/zero: it is a device"):
        load_tokenizer("/dev/zero")
    with pytest.raises(UserError, match=r"cannot read tokenizer .*none.model: No such file"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match=r"text.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")
    (tmp_path / "hf").mkdir()
    for content in ("null", "[]", "{}", '{"model": null}', "[" * 100_000, '{"model": ' + "9" * 5_000 + "}", "\ufeff{}"):
        (tmp_path / "hf/tokenizer.json").write_text(content)
        for configuration in ("null", '{"eos_token": "</s>"}', '{"eos_token": "\\ud800"}'):
            (tmp_path / "hf/tokenizer_config.json").write_text(configuration)
            with pytest.raises(UserError, match="hf is not a Hugging Face tokenizer"):
                load_tokenizer(tmp_path / "hf")
    usual = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CODE[0].text.splitlines()), model_writer=usual, vocab_size=300, minloglevel=2
    )
    (tmp_path / "usual.model").write_bytes(usual.getvalue())
    with pytest.raises(UserError, match=r"usual.model does not keep texts exact: it must have byte fallback"):
        load_tokenizer(tmp_path / "usual.model")
