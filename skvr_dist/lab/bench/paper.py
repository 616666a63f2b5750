"""Tables 4 and 5 of the paper (arXiv 2604.22782): generation with Qwen3-8B's shape in bf16 on one GPU of 80 GB."""

from __future__ import annotations

from typing import Any, NamedTuple

_SHAPE = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


class PaperRow(NamedTuple):
    """A strategy at a prompt length and a batch; None where the paper has no figure."""

    cache_mb: float | None
    peak_mb: float | None
    first_token_ms: float | None
    tokens_per_second: float | None
    """Of each sequence."""


_LENGTHS = {  # Table 4, one sequence: tokens of the prompt -> (cache MB, first token ms, tokens/s) at g=1 and at g=4
    2048: ((306, 66, 32.9), (77, 63, 43.0)),
    8192: ((1170, 297, 34.0), (293, 286, 41.6)),
    16384: ((2322, 713, 34.2), (581, 692, 41.1)),
    32768: ((4626, 1903, 22.8), (1157, 1868, 26.1)),
}
_BATCHES = {  # Table 5, prompts of 8,192 tokens: sequences -> (peak MB, first token ms, tokens/s) at g=1 and at g=4
    2: ((22973, 588, 33.3), (21245, 573, 40.3)),
    4: ((30281, 1201, 22.7), (26825, 1159, 25.9)),
    8: ((44897, 2395, 12.8), (37985, 2324, 14.7)),
    16: ((None, None, None), (60306, 4696, 8.0)),
}
_GROUPS = ("full", "every:4")
OUT_OF_MEMORY = ("full", 8192, 16)
"""The one case that the paper's GPU could not hold."""


def has_papers_shape(config: Any) -> bool:
    """Whether a model's configuration has the layers and heads of the paper's."""
    return all(getattr(config, name, None) == value for name, value in _SHAPE.items())


def paper_row(strategy: str, prompt_tokens: int, batch: int) -> PaperRow | None:
    """The paper's figures for a case; None if it has none."""
    if strategy not in _GROUPS:
        return None
    group = _GROUPS.index(strategy)
    if batch == 1 and prompt_tokens in _LENGTHS:
        cache, first, speed = _LENGTHS[prompt_tokens][group]
        return PaperRow(cache, None, first, speed)
    if prompt_tokens == 8192 and batch in _BATCHES:
        return PaperRow(None, *_BATCHES[batch][group])
    return None
