"""The self-check of an export: what transformers loads must be what was trained."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.hf.weights import WeightReader, hf_name
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder

TOLERANCE = 1e-5
"""Largest accepted logit difference, as a share of the largest logit.

With the same attention kernel on both sides the difference was 0.0 at 28 and 32 layers of random weights; with
another kernel rounding alone made 6e-6.
"""
ATTENTION = "sdpa"
"""The kernel of both sides."""
SEQUENCE_LENGTH = 128
"""Tokens per compared sequence."""

SAMPLE_TEXTS = (
    inspect.getsource(textwrap),
    "def f(x):\n\tif x:\n\t\treturn [x,\n\t\t        1234567890, 0x1F, 1e-05]\n\n\n" + " " * 37 + "# end  \r\n",
    "  leading, trailing and   inner spaces  ",
    "Größe, naïve, Ελληνικά, русский, 日本語, العربية, e\u0301 and \u00e9, \u200b\ufeff\u00a0\u3000",
    "👩‍👩‍👧 🏳️‍🌈 🇪🇺 \U0010fffd",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "<s>text</s> <unk> <pad> <0x0A> \u2581",
    "",
)
"""Python source, indentation, digits, scripts, emoji, control characters, names of special tokens."""


@dataclass(frozen=True)
class CheckReport:
    """What the comparison of a reloaded export with its source found."""

    differing_weights: tuple[str, ...]
    """Canonical names of the weights that are not stored bit for bit."""
    positions: int
    """Tokens whose logits were compared."""
    max_logit_difference: float
    largest_logit: float
    tokenizer_texts: int
    """Texts that both tokenizers were given; 0 without a tokenizer."""
    differing_texts: tuple[str, ...]
    """Texts that they encode differently, or that do not decode to themselves."""

    @property
    def relative_logit_difference(self) -> float:
        return self.max_logit_difference / self.largest_logit if self.largest_logit else self.max_logit_difference

    def failures(self) -> list[str]:
        """One sentence per figure that was missed."""
        found = []
        if self.differing_weights:
            found.append(
                f"{len(self.differing_weights)} weights differ from the checkpoint's, the first is "
                f"{self.differing_weights[0]}"
            )
        if not self.relative_logit_difference <= TOLERANCE:  # so that NaN fails
            found.append(
                f"logits differ by {self.max_logit_difference:.3g}, {self.relative_logit_difference:.3g} of the "
                f"largest one; {TOLERANCE:.0e} is accepted"
            )
        if self.differing_texts:
            found.append(
                f"the tokenizers disagree on {len(self.differing_texts)} of {self.tokenizer_texts} texts, "
                f"the first is {self.differing_texts[0][:80]!r}"
            )
        return found


@torch.no_grad()
def check_export(
    folder: Path, config: ModelConfig, weight: WeightReader, dtype: torch.dtype, tokenizer_file: Path | None
) -> CheckReport:
    """Reload an export with transformers and compare it, in float32 on the CPU, with our decoder at full retention.

    Both sides hold the weights as stored, so rounding them to `dtype` is no difference. One of the two models is
    in memory at a time, in float32.
    """
    differing_texts: tuple[str, ...] = ()
    sequences = _drawn_sequences(config)
    if tokenizer_file is not None:
        source = Tokenizer.load(tokenizer_file)
        differing_texts = _differing_texts(folder, source)
        encoded = [torch.tensor(source.encode(text)[:SEQUENCE_LENGTH]) for text in SAMPLE_TEXTS]
        sequences = [tokens[: config.max_position_embeddings] for tokens in encoded if len(tokens)]

    exported = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION, local_files_only=True
    )
    loaded = exported.state_dict()
    decoder = _meta_decoder(config)
    names = list(decoder.state_dict())
    differing_weights = tuple(
        name for name in names if not torch.equal(loaded[hf_name(name)], _as_stored(weight(name), dtype))
    )
    found = torch.cat([exported(tokens[None]).logits[0] for tokens in sequences])
    del exported, loaded

    decoder.load_state_dict({name: _as_stored(weight(name), dtype) for name in names}, assign=True)
    full = range(config.num_hidden_layers)
    wanted = torch.cat([decoder(tokens[None], full)[0] for tokens in sequences])
    return CheckReport(
        differing_weights=differing_weights,
        positions=len(wanted),
        max_logit_difference=float((found - wanted).abs().max()),
        largest_logit=float(wanted.abs().max()),
        tokenizer_texts=0 if tokenizer_file is None else len(SAMPLE_TEXTS),
        differing_texts=differing_texts,
    )


def _meta_decoder(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config.model_copy(update={"attention": ATTENTION}))


def _as_stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).float()


def _drawn_sequences(config: ModelConfig) -> list[Tensor]:
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    return list(torch.randint(config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0)))


def _differing_texts(folder: Path, source: Tokenizer) -> tuple[str, ...]:
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    differing = []
    for text in SAMPLE_TEXTS:
        ids = source.encode(text)
        found = exported(text, verbose=False)["input_ids"]  # not verbose: a text may be longer than a sequence
        if found != ids or exported.decode(ids) != text:
            differing.append(text)
    return tuple(differing)
