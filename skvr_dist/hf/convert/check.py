"""The self-check of exports and imports: what transformers loads must be what our decoder computes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from skvr_dist.config.model import ModelConfig
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.hf.convert.weights import WeightReader, hf_name
from skvr_dist.hf.model.causal_lm import decoding_error
from skvr_dist.hf.model.families import CLASSES
from skvr_dist.hf.model.layers import route
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

TOLERANCE = 1e-5
"""Largest accepted logit difference, as a share of the largest logit.

With the same attention kernel on both sides the difference was 0.0 at 28 and 32 layers of random weights; with
another kernel rounding alone made 6e-6.
"""
DECODING_TOLERANCE = 1e-4
"""The same for decoding with a cache beside none, where products of one row and of many round differently.

Trained weights enlarge that: SmolLM2's 30 layers made 3.0e-5, those of random weights below 1e-5.
"""
ATTENTION = "sdpa"
"""Attention kernel of both sides."""
SEQUENCE_LENGTH = 128
"""Tokens per compared sequence."""
PROMPT_LENGTH, DECODED_TOKENS = 16, 8
"""Tokens of a prompt, and tokens decoded after it with each cache at each strategy."""
CACHES = ("dynamic", "static")

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


class LoadError(Exception):
    """transformers cannot load a folder; the message says why."""


@dataclass(frozen=True)
class CheckReport:
    """What the comparison of a reloaded export with its source found."""

    differing_weights: tuple[str, ...]
    """Canonical names of the weights that are not stored bit for bit."""
    positions: int
    """Tokens whose logits were compared, at each strategy."""
    strategies: tuple[str, ...]
    """Strategies at which logits were compared: full retention by the plain class, the others by the routed one."""
    max_logit_difference: float
    largest_logit: float
    decoding_errors: dict[str, float]
    """Logit differences between greedy decoding with a cache and without one, as a share of the largest logit, by
    strategy and kind of cache."""
    tokenizer_texts: int
    """Texts that both tokenizers were given; 0 without a tokenizer."""
    differing_texts: tuple[str, ...]
    """Texts that they encode or decode differently."""

    @property
    def relative_logit_difference(self) -> float:
        """The largest difference as a share of the largest logit."""
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
        for where, error in self.decoding_errors.items():
            if not error <= DECODING_TOLERANCE:
                found.append(
                    f"greedy decoding at {where} gives logits that differ by {error:.3g} of the largest one from those "
                    f"without a cache; {DECODING_TOLERANCE:.0e} is accepted"
                )
        if self.differing_texts:
            found.append(
                f"the tokenizers disagree on {len(self.differing_texts)} of {self.tokenizer_texts} texts, "
                f"the first is {self.differing_texts[0][:80]!r}"
            )
        return found


@torch.no_grad()
def check_export(
    folder: Path,
    config: ModelConfig,
    weight: WeightReader,
    dtypes: Mapping[str, torch.dtype] | None,
    tokenizer_file: Path | None,
    pruned_to: CacheStrategy | None = None,
    loading: Mapping[str, Any] | None = None,
) -> CheckReport:
    """Load a folder of Hugging Face and compare it, in float32 on the CPU, with our decoder.

    Both sides hold the weights as stored, so rounding them to `dtypes` is no difference. One of both is in memory.

    Args:
        weight: ours, by canonical name.
        dtypes: of the weights in the folder, by canonical name; None where they have the dtypes of ours.
        tokenizer_file: the data set's tokenizer, with which the folder's must agree, if any.
        pruned_to: the one strategy that the folder serves; None for a plain checkpoint.
        loading: further arguments of `from_pretrained`, such as the GGUF file that holds the model.

    Raises:
        LoadError: transformers cannot load the folder.
    """
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    differing_texts = () if tokenizer is None else _differing_texts(folder, tokenizer)
    sequences = _drawn_sequences(config) if tokenizer is None else _encoded_samples(config, tokenizer)
    strategies = _strategies(config, pruned_to)

    def as_stored(name: str) -> Tensor:
        ours = weight(name)
        return ours.to((dtypes or {}).get(name, ours.dtype)).float()

    decoder = _meta_decoder(config)
    names = list(decoder.state_dict())
    exported = _load(folder, config, pruned_to, loading or {})
    loaded = exported.state_dict()
    stored = [name for name in names if pruned_to is None or hf_name(name) in loaded]
    differing_weights = tuple(name for name in stored if not torch.equal(loaded[hf_name(name)], as_stored(name)))
    found = _logits(exported, strategies, sequences)
    if pruned_to is None:
        exported.__class__ = CLASSES[config.architecture].routed  # the class that loading at a strategy makes
    decoding_errors = _decoding_errors(exported, strategies, sequences[0])
    del exported, loaded

    decoder.load_state_dict({name: as_stored(name) for name in names}, assign=True)
    wanted = _logits_of_ours(decoder, strategies, sequences)
    differences = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
    return CheckReport(
        differing_weights=differing_weights,
        positions=len(wanted[0]),
        strategies=tuple(strategies),
        max_logit_difference=float(torch.tensor(differences).max()),  # NaN wins, unlike in max()
        largest_logit=max(float(logits.abs().max()) for logits in wanted),
        decoding_errors=decoding_errors,
        tokenizer_texts=0 if tokenizer_file is None else len(SAMPLE_TEXTS) + 1,
        differing_texts=differing_texts,
    )


def _logits_of_ours(
    decoder: Decoder, strategies: Mapping[str, CacheStrategy], sequences: Sequence[Tensor]
) -> list[Tensor]:
    """Logits [positions of all sequences, V] at each strategy."""
    return [
        torch.cat([decoder(tokens[None], strategy.kv_source_layers)[0] for tokens in sequences])
        for strategy in strategies.values()
    ]


def _load(folder: Path, config: ModelConfig, pruned_to: CacheStrategy | None, loading: Mapping[str, Any]) -> Any:
    """The model of a folder: of the plain class, unless it was pruned."""
    classes = CLASSES[config.architecture]
    model_class = classes.plain if pruned_to is None else classes.pruned
    options = {"dtype": torch.float32, "attn_implementation": ATTENTION, "local_files_only": True, **loading}
    try:
        return model_class.from_pretrained(folder, **options)
    except Exception as error:  # of any type, for what is wrong with any of its files
        raise LoadError(f"transformers cannot load {folder} ({type(error).__name__}: {error})") from error


def _logits(exported: Any, strategies: Mapping[str, CacheStrategy], sequences: Sequence[Tensor]) -> list[Tensor]:
    """Logits of all sequences joined, [positions, V], at each strategy; a plain model becomes routed on the way."""
    found = []
    for strategy in strategies.values():
        if strategy.retention < 1:
            route(exported).kv_sources = strategy.kv_source_layers
        found.append(torch.cat([exported(tokens[None], use_cache=False).logits[0] for tokens in sequences]))
    return found


def _decoding_errors(exported: Any, strategies: Mapping[str, CacheStrategy], sequence: Tensor) -> dict[str, float]:
    """Decoding errors of a routed model after the beginning of a sequence, int [S], by strategy and kind of cache."""
    longest = exported.config.max_position_embeddings
    new_tokens = min(DECODED_TOKENS, longest - 1)
    prompt = sequence[None, : min(PROMPT_LENGTH, longest - new_tokens)]
    errors = {}
    for name, strategy in strategies.items():
        exported.model.kv_sources = strategy.kv_source_layers
        for kind in CACHES:
            options = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
            errors[f"{name} with a {kind} cache"] = decoding_error(exported, prompt, new_tokens, **options)
    return errors


def _strategies(config: ModelConfig, pruned_to: CacheStrategy | None) -> dict[str, CacheStrategy]:
    """Full retention and two strategies at which layers share caches, one of layers over all depths, one of the first;
    of a pruned checkpoint the one that it serves."""
    if pruned_to is not None:
        return {f"layers {','.join(map(str, pruned_to.retained))}": pruned_to}
    layers = config.num_hidden_layers
    return CacheStrategy.parse_all(("full", "every:2", f"prefix:{(layers + 1) // 2}"), layers)


def _meta_decoder(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config.model_copy(update={"attention": ATTENTION}))


def _drawn_sequences(config: ModelConfig) -> list[Tensor]:
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    return list(torch.randint(config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0)))


def _encoded_samples(config: ModelConfig, tokenizer: Tokenizer) -> list[Tensor]:
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    encoded = [torch.tensor(tokenizer.encode(text)[:length]) for text in SAMPLE_TEXTS]
    return [tokens for tokens in encoded if len(tokens)]


def _differing_texts(folder: Path, source: Tokenizer) -> tuple[str, ...]:
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    differing = []
    for text in (*SAMPLE_TEXTS, f"a{exported.eos_token}b"):  # the name is just text
        ids = source.encode(text)
        found = exported(text, verbose=False)["input_ids"]  # not verbose: a text may be longer than a sequence
        if found != ids or exported.decode(ids) != source.decode(ids):
            differing.append(text)
    return tuple(differing)
