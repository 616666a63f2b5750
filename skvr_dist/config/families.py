"""The families of decoders that are trained and published, and how they differ.

Everything that is data is here, once; everything else asks this table. Classes cannot be data: exports, vLLM and type
checkers know them by name. They are, a few lines each, in `hf/model/cache_config.py`, `hf/model/layers.py`,
`hf/model/causal_lm.py`, `serve/sharing.py`, `serve/fast_prefill.py` and `serve/models.py`; `hf/model/families.py`
lists those of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Architecture = Literal["qwen3", "qwen2", "llama", "mistral"]


@dataclass(frozen=True)
class Family:
    """The facts of one family."""

    name: Architecture
    """Name in our model section, and the `model_type` of transformers."""
    label: str
    """Prefix of its class names, such as `Qwen3` in `Qwen3ForCausalLM`."""
    qk_norm: bool
    """Whether each query and key head is normed before the rotation."""
    attention_bias: Literal["optional", "never", "q, k and v"]
    """Which projections of attention have biases: `optional`, all four where `attention_bias` is true; or always those
    of queries, keys and values, and never that of the output."""
    head_dim: Literal["free", "heads divide hidden_size", "hidden_size / heads"]
    """What transformers wants of the size of a head; it has no field for one that follows from the others."""
    hf_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration of transformers whose defaults are not what our decoder computes."""
    gguf_architecture: str | None = None
    """Name of the architecture in GGUF files; None where they name another family instead."""
    gguf_pairs_rows: bool = False
    """Whether GGUF files hold query and key rows in pairs of a rotation side by side, as Llama was first released."""

    tokenizer_class: str | None = None
    """The class as which `AutoTokenizer` loads every tokenizer of the family, whatever its files say, if it does."""

    @property
    def causal_lm(self) -> str:
        """The class of transformers, which is the architecture in `config.json`."""
        return f"{self.label}ForCausalLM"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "qwen3",
            "Qwen3",
            qk_norm=True,
            attention_bias="optional",
            head_dim="free",
            gguf_architecture="qwen3",
        ),
        Family(
            "qwen2",
            "Qwen2",
            qk_norm=False,
            attention_bias="q, k and v",
            head_dim="hidden_size / heads",
            gguf_architecture="qwen2",
            tokenizer_class="Qwen2Tokenizer",
        ),
        Family(
            "llama",
            "Llama",
            qk_norm=False,
            attention_bias="optional",
            head_dim="heads divide hidden_size",
            gguf_architecture="llama",
            gguf_pairs_rows=True,
        ),
        Family(
            "mistral",
            "Mistral",
            qk_norm=False,
            attention_bias="never",
            head_dim="free",
            hf_fields={"sliding_window": None},  # transformers' default is a window of 4096
        ),
    )
}
"""Every family by its name, in the order in which they are listed to users."""
