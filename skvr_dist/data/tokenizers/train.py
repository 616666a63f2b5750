"""Training a tokenizer: sentencepiece, shown the chunks of a corpus and how often each occurs.

Ids: <unk> 0, <s> 1, </s> 2, then 256 bytes, then pieces.
"""

from __future__ import annotations

import heapq
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from skvr_dist.data.prepare.corpus import Document, hash_fraction
from skvr_dist.data.tokenizers.sentencepiece import SPACE_SIGN, SentencePieceTokenizer
from skvr_dist.errors import UserError

ModelType = Literal["bpe", "unigram"]
TRAINING_CHARS = 30_000_000
"""Characters that a tokenizer is trained on at most; more documents than that are sampled."""
# What a piece may be a part of: line feeds with the indentation after them, a word with the space before it, spaces,
# other whitespace.
_CHUNK = re.compile(r"\n+ *| ?\S+| +|[^\S \n]+")
# Sentencepiece's trainer keeps these for itself (tab and null end a text, the others are its signs for space and
# unknown); in a text they are encoded as bytes.
_RESERVED = re.compile(f"[\t\0{SPACE_SIGN}\u2585]")
# Sentencepiece learns runs of line feeds and runs of spaces, but no piece that holds both. Common indentations get a
# piece of their own: at most this many, each at least this share of all chunks. On Python source: 6 % fewer tokens.
_MAX_INDENTATIONS = 16
_INDENTATION_SHARE = 1e-3
# The most frequent chunks (and for unigram, seeds) that training looks at, per piece to learn. Halving it costs 0.5 %
# more tokens on Python source with 2048 pieces; no limit saves 0.1 % and takes seven times as long (unigram).
_CHUNKS_PER_PIECE = 50
# Characters of the other chunks that it looks at, per chunk: about the length of a word.
_REST_CHARS_PER_CHUNK = 10
# Longer ones are cut, because sentencepiece passes over those of more than 4192 bytes. In Latin script that is right:
# what is so long is no text.
_MAX_CHUNK_CHARS = 1000
_CHARACTER_COVERAGE = 0.9999  # rarer characters get no piece of their own
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 260, 10_000_000
# Sums of up to 2**17 nats are exact in single precision (24 bits) with steps of 1/128.
UNIGRAM_SCORE_STEPS = 128


def train_tokenizer(
    documents: Iterable[Document], *, vocab_size: int, model_type: ModelType = "bpe"
) -> SentencePieceTokenizer:
    """Train a tokenizer: the same documents give the same bytes, whatever the machine or their order.

    Raises:
        UserError: sentencepiece cannot make a vocabulary of this size from these documents.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} pieces cannot be: it has at least {SMALLEST_VOCABULARY}, for 256 bytes, "
            f"three special tokens and a character, and at most {LARGEST_VOCABULARY}"
        )
    counts = _count_chunks(_sample(documents, TRAINING_CHARS))
    if not counts:
        raise UserError("a tokenizer learns nothing from documents of tabs and NUL characters; give some with words")
    occurrences = counts.total()
    indentations = [
        (chunk, count)
        for chunk, count in _most_frequent(counts, len(counts))
        if chunk[0] == "\n" and chunk[-1] == " " and count >= occurrences * _INDENTATION_SHARE
    ][:_MAX_INDENTATIONS]
    limit = _CHUNKS_PER_PIECE * vocab_size
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            # Chunks and their counts instead of sentences: fast, and the only way to show the trainer a line feed at
            # the end of a text.
            sentence_iterator=(f"{chunk}\t{count}" for chunk, count in _representative(counts, limit)),
            input_format="tsv",
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size - len(indentations),
            seed_sentencepiece_size=limit,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=_CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,  # the chunks are split already
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentencepiece_length=32,  # eight levels of indentation
            num_threads=4,  # unigram adds its expectations up per thread: another number, another rounding
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = _reason(error, len(indentations))
        raise UserError(f"sentencepiece cannot train a vocabulary of {vocab_size} pieces: {reason}") from None
    return SentencePieceTokenizer(_append_pieces(model.getvalue(), indentations, occurrences))


def _reason(error: Exception, added: int) -> str:
    """Why training failed, without the place in sentencepiece's source; `added` pieces come on top of its own."""
    text = re.sub(r"^\w+: \S+\(\d+\) \[.*\] ", "", " ".join(str(error).split()))
    if found := re.search(r"too high .* <= (\d+)", text):
        return f"the documents give at most {int(found[1]) + added}; ask for fewer or give more documents"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return f"the characters of the documents need at least {int(found[1]) + added}"
    return text


def _sample(documents: Iterable[Document], max_chars: int) -> list[str]:
    """The documents whose ids hash lowest, until they hold `max_chars` characters."""
    heap: list[tuple[float, str, str]] = []
    chars = 0
    for document in documents:
        text = document.text[:max_chars]
        heapq.heappush(heap, (-hash_fraction(document.id, "tokenizer"), document.id, text))
        chars += len(text)
        while chars - len(heap[0][2]) >= max_chars:
            chars -= len(heapq.heappop(heap)[2])
    return [text for _, _, text in heap]


def _count_chunks(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_CHUNK.findall(text))

    def is_too_long(chunk: str) -> bool:
        return len(chunk) > _MAX_CHUNK_CHARS and bool(_script(chunk))

    for chunk in [chunk for chunk in counts if _RESERVED.search(chunk) or is_too_long(chunk)]:
        count = counts.pop(chunk)
        for part in filter(None, _RESERVED.split(chunk)):
            size = _MAX_CHUNK_CHARS if is_too_long(part) else len(part)
            for start in range(0, len(part), size):
                counts[part[start : start + size]] += count
    return counts


def _representative(counts: Counter[str], limit: int) -> list[tuple[str, int]]:
    """The `limit` most frequent chunks; and of the others, those in scripts other than Latin, or a sample of them.

    Where words are written without spaces a chunk is a sentence, and hardly one of them comes twice. Such a script
    would not be seen at all, however much of the corpus is written in it. Of a sample of 1/k each stands for k.
    """
    ranked = _most_frequent(counts, len(counts))
    chars: Counter[str] = Counter()
    for chunk, count in ranked:
        chars[_script(chunk)] += len(chunk) * count
    seen = {script for script, number in chars.items() if script and number > (1 - _CHARACTER_COVERAGE) * chars.total()}
    rest = [(chunk, count) for chunk, count in ranked[limit:] if _script(chunk) in seen]
    one_of = math.ceil(sum(len(chunk) for chunk, _ in rest) / (_REST_CHARS_PER_CHUNK * limit))
    return ranked[:limit] + [
        (chunk, count * one_of) for chunk, count in rest if hash_fraction(chunk, "chunks") * one_of < 1
    ]


def _script(chunk: str) -> str:
    """The script of its first letter that is not Latin, as Unicode calls it; empty for none."""
    if chunk.isascii():
        return ""
    return next((script for character in chunk if (script := _script_of(character))), "")


@cache
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "").partition(" ")[0].removeprefix("LATIN")


def _most_frequent(counts: Counter[str], limit: int) -> list[tuple[str, int]]:
    """Chunks by falling count, ties in the order of their characters."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def _append_pieces(model: bytes, chunks: Sequence[tuple[str, int]], occurrences: int) -> bytes:
    """The model with a normal piece for each chunk, so that any reader of `.model` files understands it.

    BPE scores are minus the order of merging: these pieces merge last, after the runs they are made of. Unigram
    scores are log probabilities, rounded so that sums of them are exact in single precision: sentencepiece adds them
    up in single, transformers in double, and a text must not get other tokens for that.
    """
    proto = sentencepiece_model.ModelProto()
    proto.ParseFromString(model)
    bpe = proto.trainer_spec.model_type == sentencepiece_model.TrainerSpec.BPE
    last = min(piece.score for piece in proto.pieces)
    for rank, (chunk, count) in enumerate(chunks, start=1):
        score = last - rank if bpe else math.log(count / occurrences)
        proto.pieces.add(piece=chunk.replace(" ", SPACE_SIGN), score=score)
    if not bpe:
        for piece in proto.pieces:
            piece.score = round(piece.score * UNIGRAM_SCORE_STEPS) / UNIGRAM_SCORE_STEPS
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)
