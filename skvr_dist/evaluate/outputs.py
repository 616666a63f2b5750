"""What a smaller cache does to outputs that programs read, prompt by prompt against full retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.finetune.prompts import Prompt
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.evaluate.generate import decode_all
from skvr_dist.evaluate.intervals import AnswerBootstrap, Interval
from skvr_dist.evaluate.metrics import mean_of_sums
from skvr_dist.evaluate.structured import Output, Schema
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

FULL = "full"


@dataclass(frozen=True)
class OutputPoint:
    """The outputs at a cache strategy. Shares are not numbers where there is nothing to count."""

    strategy: str
    retention: float
    prompts: int
    valid: Interval
    """Share of the outputs that are JSON and fit their schema."""
    same_calls: Interval
    """Share of the prompts with equal calls of tools (names and arguments, in order) as at full retention, of those
    where either makes one."""
    same_text: Interval
    """Share of the outputs that are equal to the letter."""


@dataclass(frozen=True)
class Outputs:
    """The outputs at several strategies, full retention first."""

    points: list[OutputPoint]
    texts: dict[str, list[str]]
    """Of each prompt, by strategy."""


def measure_outputs(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    strategies: Mapping[str, CacheStrategy],
    *,
    schema: Schema | None,
    tokenizer: Tokenizer,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
) -> Outputs:
    """Decode greedily at each strategy, full retention among them in any case, and read what comes.

    Args:
        schema: of outputs that call no tools; the arguments of a tool have their own.

    Raises:
        UserError: a tool's parameters are no schema.
    """
    tools = [
        {name: Schema(s, f"{prompt.place}, tool {name}") for name, s in prompt.tools.items()} for prompt in prompts
    ]
    reads = [torch.tensor(prompt.tokens, dtype=torch.long) for prompt in prompts]
    bootstrap = AnswerBootstrap(range(len(prompts)))
    texts: dict[str, list[str]] = {}
    points: list[OutputPoint] = []
    first: list[Output] = []
    for name, strategy in {FULL: CacheStrategy.full(decoder.config.num_hidden_layers), **strategies}.items():
        texts[name] = decode_all(
            decoder, reads, strategy, tokenizer, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, name=name
        )
        outputs = [Output.of(text) for text in texts[name]]
        first = first or outputs
        valid = [output.is_valid(schema, of_prompt) for output, of_prompt in zip(outputs, tools, strict=True)]
        pairs = list(zip(outputs, first, strict=True))
        points.append(
            OutputPoint(
                strategy=name,
                retention=strategy.retention,
                prompts=len(prompts),
                valid=_share(bootstrap, valid),
                same_calls=_share(
                    bootstrap, [a.calls == b.calls for a, b in pairs], [bool(a.calls or b.calls) for a, b in pairs]
                ),
                same_text=_share(bootstrap, [a.text == b.text for a, b in pairs]),
            )
        )
    return Outputs(points, texts)


def stop_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an output: that of the tokenizer, and those that the configuration of an import names."""
    named = (checkpoint.facts.special_ids or {}).get("eos_token_id")
    return sorted({tokenizer.eos_id, *(named if isinstance(named, list) else [named] if named is not None else [])})


def _share(bootstrap: AnswerBootstrap, hits: Sequence[bool], counted: Sequence[bool] | None = None) -> Interval:
    """Share of the hits among what is counted, all of it by default."""
    weights = np.ones(len(hits)) if counted is None else np.array(counted, dtype=np.float64)
    counts: NDArray[np.float64] = np.stack([np.array(hits, dtype=np.float64) * weights, weights], axis=1)
    return bootstrap.interval(counts, mean_of_sums)
