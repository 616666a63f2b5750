"""Sentencepiece models, with the settings that keep every text exact.

No normalisation, no space put before the text, no whitespace removed, unknown characters as their UTF-8 bytes:
decode(encode(text)) == text for any valid Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError

# Sentencepiece writes a space as this character, and would read it back as a space.
SPACE_SIGN = "\u2581"
# Texts are encoded in stretches of about this size: twice as fast as whole files of 100 kB, and in bounded memory.
_STRETCH_CHARS = 10_000
# A stretch ends before a line feed that follows something else. No piece that `train_tokenizer` makes spans
# that place, so the tokens are those of the whole text; a model with a piece that does is not given stretches.
_STRETCH_END = re.compile(r"(?<!\n)\n")


class SentencePieceTokenizer(Tokenizer):
    """A trained sentencepiece model.

    Args:
        model: content of a `.model` file.
        name: where it came from, for messages.

    Raises:
        UserError: not a sentencepiece model, or one whose settings do not keep texts exact.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        settings = sentencepiece_model.ModelProto()
        try:
            settings.ParseFromString(model)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception:  # sentencepiece and protobuf raise unrelated types, none of them public
            raise UserError(f"{name} is not a sentencepiece model") from None
        normalizer, trainer = settings.normalizer_spec, settings.trainer_spec
        exact = trainer.byte_fallback and not (
            normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap
        )
        if not exact or self._processor.eos_id() < 0:
            raise UserError(
                f"{name} does not keep texts exact: it must have byte fallback, an end-of-sequence token, no "
                f"normalisation and no added space; train one with tools/train_tokenizer.py"
            )
        self.model = model
        self._within_names: re.Pattern[str] | None = None
        if trainer.model_type == trainer.UNIGRAM:
            # What reads like the name of a special token is divided after its first character. Sentencepiece makes no
            # such token of a text, but transformers' unigram model would, if it found the whole name.
            rests: dict[str, list[str]] = {}  # by first character: hundreds of alternatives would be tried everywhere
            for name_of_token in special_names(settings):
                rests.setdefault(name_of_token[0], []).append(re.escape(name_of_token[1:]))
            self._within_names = re.compile(
                "|".join(rf"(?<={re.escape(first)})(?=(?:{'|'.join(rest)}))" for first, rest in rests.items())
            )
        self._can_split = not any(_STRETCH_END.search(piece.piece, 1) for piece in settings.pieces)
        self._space_sign_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]

    def encode(self, text: str) -> list[int]:
        if SPACE_SIGN not in text and len(text) <= _STRETCH_CHARS:
            return self._encode(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_SIGN)):
            if number:
                ids += self._space_sign_ids
            for stretch in self._stretches(part):
                ids += self._encode(stretch)
        return ids

    def _encode(self, text: str) -> list[int]:
        if self._within_names is None:
            ids: list[int] = self._processor.encode(text)
            return ids
        return [token for part in self._within_names.split(text) for token in self._processor.encode(part)]

    def _stretches(self, text: str) -> Iterator[str]:
        start = 0
        while self._can_split and (end := _STRETCH_END.search(text, start + _STRETCH_CHARS)):
            yield text[start : end.start()]
            start = end.start()
        yield text[start:]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def eos_id(self) -> int:
        return int(self._processor.eos_id())


def special_names(model: sentencepiece_model.ModelProto) -> list[str]:
    """Names of the tokens that no text is made of: bytes (`<0x0A>`), control symbols (`</s>`) and unknown."""
    kinds = sentencepiece_model.ModelProto.SentencePiece
    return [piece.piece for piece in model.pieces if piece.type in (kinds.BYTE, kinds.CONTROL, kinds.UNKNOWN)]
