"""Tokenizers of each kind, trained on a module of the standard library."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from skvr_dist.data.prepare.corpus import Document
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.data.tokenizers.train import train_tokenizer

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
    load_tokenizer(folder).save(file)
    return file
