"""Our sentencepiece tokenizers as fast tokenizers: the same ids for any text, without any code of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a checkpoint of Hugging Face may hold of its tokenizer and how to generate with it."""
_SPACE_SIGN = "\u2581"  # sentencepiece's spelling of a space within its pieces


def convert_tokenizer(file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Convert a sentencepiece model of our data sets.

    As in training, no token is added to a text and the names of special tokens in a text are just text. A document
    of the training data starts after the `</s>` of the one before and never with `<s>`, so `</s>` is declared as
    the token to begin with too. `<unk>`, which byte fallback never yields, pads.

    Args:
        max_length: longest sequence of the model, in tokens.

    Raises:
        UserError: `Tokenizer` refuses the file, or it is not a BPE model.
    """
    model = ModelProto.FromString(Tokenizer.load(file).model)
    kind = TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
    if kind != "BPE":
        # Both libraries add up a unigram model's scores, one in single and one in double precision: some texts then
        # get other tokens (measured: 8 of 234 files of the Python standard library).
        raise UserError(
            f"tokenizer {file} is of type {kind.lower()}, but only bpe gives the same ids in transformers; "
            f"export the weights without a tokenizer"
        )
    unk, eos = model.trainer_spec.unk_piece, model.trainer_spec.eos_piece
    piece_type = ModelProto.SentencePiece
    # With plain spaces in the pieces no text needs normalising, and a space sign in a text stays what it is.
    pieces = [(piece.piece.replace(_SPACE_SIGN, " "), piece) for piece in model.pieces]
    vocab = {text: number for number, (text, _) in enumerate(pieces)}
    # Only normal pieces come out of merges: sentencepiece never builds a control symbol or a byte from text.
    scores = {text: piece.score for text, piece in pieces if piece.type == piece_type.NORMAL}
    merges = generate_merges({text: vocab[text] for text in scores}, scores)
    fast = FastTokenizer(BPE(vocab=vocab, merges=merges, unk_token=unk, byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True)
            for text, piece in pieces
            if piece.type in (piece_type.CONTROL, piece_type.UNKNOWN)
        ]
    )
    # Sentencepiece looks for user-defined symbols after it spelled spaces its way: one with a plain space is never met.
    fast.add_tokens(
        [
            AddedToken(text, normalized=False)
            for text, piece in pieces
            if piece.type == piece_type.USER_DEFINED and " " not in piece.piece
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=eos,
        eos_token=eos,
        unk_token=unk,
        pad_token=unk,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as generation needs it
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
    )


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    stored["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows and 5 still takes
    file.write_text(json.dumps(stored, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy somebody else's tokenizer as it is."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that a model configuration repeats from its tokenizer."""
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
