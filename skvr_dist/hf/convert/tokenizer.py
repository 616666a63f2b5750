"""The tokenizers of our data sets as those of transformers: the same ids for any text, without any code of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from skvr_dist.data.tokenizers.hugging_face import HuggingFaceTokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.data.tokenizers.sentencepiece import SPACE_SIGN, special_names
from skvr_dist.data.tokenizers.train import UNIGRAM_SCORE_STEPS
from skvr_dist.errors import UserError

_Piece: TypeAlias = ModelProto.SentencePiece


def convert_tokenizer(file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Convert the tokenizer of a data set: a sentencepiece model, or a Hugging Face one in our single file.

    As in training, no token is added to a text and the names of special tokens in a text are just text. A document
    of the training data starts after the end-of-sequence token of the one before and never with a token of its own,
    so that one is declared as the token to begin with too. Sequences are padded with the token that a Hugging Face
    tokenizer has for it, or with `<unk>`, which byte fallback never yields; without either, with the end-of-sequence
    token.

    Args:
        max_length: longest sequence of the model, in tokens.

    Raises:
        UserError: `Tokenizer` refuses the file, or transformers cannot give the same ids.
    """
    tokenizer = load_tokenizer(file)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        fast, eos, unk, pad = tokenizer.for_export(), tokenizer.eos_token, None, tokenizer.pad_token
    else:
        model = ModelProto.FromString(tokenizer.model)
        fast, eos, unk = _from_sentencepiece(model, file), model.trainer_spec.eos_piece, model.trainer_spec.unk_piece
        pad = unk
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=eos,
        eos_token=eos,
        unk_token=unk,
        pad_token=pad or eos,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as generation needs it
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
    )


def _from_sentencepiece(model: ModelProto, file: Path) -> FastTokenizer:
    kind = TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
    if kind not in ("BPE", "UNIGRAM"):
        raise UserError(
            f"tokenizer {file} is of type {kind.lower()}, but only bpe and unigram give the same ids in transformers; "
            f"export the weights without a tokenizer"
        )
    # With plain spaces in the pieces no text needs normalising, and a space sign in a text stays what it is.
    pieces = [(piece.piece.replace(SPACE_SIGN, " "), piece) for piece in model.pieces]
    if kind == "BPE":
        fast = FastTokenizer(_bpe(pieces, model.trainer_spec.unk_piece))
    else:
        fast = FastTokenizer(_unigram(pieces, file))
        name_start = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in special_names(model))
        # Splits where `SentencePieceTokenizer` does.
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(name_start), "merged_with_previous")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True)
            for text, piece in pieces
            if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)
        ]
    )
    # Sentencepiece looks for user-defined symbols after it spelled spaces its way: one with a plain space is never met.
    fast.add_tokens(
        [
            AddedToken(text, normalized=False)
            for text, piece in pieces
            if piece.type == _Piece.USER_DEFINED and " " not in piece.piece
        ]
    )
    return fast


def _bpe(pieces: Sequence[tuple[str, _Piece]], unk: str) -> BPE:
    vocab = {text: number for number, (text, _) in enumerate(pieces)}
    # Only normal pieces come out of merges: sentencepiece never builds a control symbol or a byte from text.
    scores = {text: piece.score for text, piece in pieces if piece.type == _Piece.NORMAL}
    merges = generate_merges({text: vocab[text] for text in scores}, scores)
    return BPE(vocab=vocab, merges=merges, unk_token=unk, byte_fallback=True)


def _unigram(pieces: Sequence[tuple[str, _Piece]], file: Path) -> Unigram:
    """transformers' unigram model of the same pieces; raises `UserError` if it would segment some texts otherwise.

    Both libraries look for the segmentation with the largest sum of scores, sentencepiece in single precision and
    transformers in double: the same only where both are exact. (Otherwise 8 of 234 files of the Python standard
    library differ.)
    """
    if any(piece.type == _Piece.USER_DEFINED for _, piece in pieces) or any(
        piece.score * UNIGRAM_SCORE_STEPS % 1 for _, piece in pieces
    ):
        raise UserError(
            f"tokenizer {file} is a unigram model with user-defined symbols or scores that are no multiples of "
            f"1/{UNIGRAM_SCORE_STEPS}, for which transformers gives other ids for some texts; export the weights "
            f"without a tokenizer, or train one with tools/train_tokenizer.py"
        )
    return Unigram([(text, piece.score) for text, piece in pieces], unk_id=0, byte_fallback=True)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    stored["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows and 5 still takes
    file.write_text(json.dumps(stored, indent=2) + "\n")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that a model configuration repeats from its tokenizer."""
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
