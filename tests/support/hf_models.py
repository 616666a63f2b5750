"""Tiny models of every family for the tests of `skvr_dist.hf`, with the weights of the plain reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import export_model
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.hf.convert.weights import hf_name
from skvr_dist.hf.model.families import CLASSES
from skvr_dist.lab.verify import reference
from skvr_dist.model.decoder import KV, Decoder
from skvr_dist.routing import CacheStrategy

STRATEGIES = {"every:2": (0, 2, 4, 6), "every:4": (0, 4), "prefix:3": (0, 1, 2), "irregular": (0, 3, 4, 7)}


def shape_of(architecture: str, **changes: Any) -> ModelConfig:
    """Eight layers; a theta and an epsilon that are nobody's default."""
    fields = {
        "architecture": architecture,
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_theta": 777.0,
        "rms_norm_eps": 3e-4,
        "qk_norm": FAMILIES[architecture].qk_norm,
        "attention_bias": FAMILIES[architecture].attention_bias == "q, k and v",
        "tie_word_embeddings": False,
        **changes,
    }
    return ModelConfig(**fields)


def random_weights(config: ModelConfig, scale: float = 0.3) -> dict[str, Tensor]:
    """Larger than initial weights and with uneven norms and biases, so that attention patterns and biases matter."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
        for name, tensor in Decoder(config).state_dict().items()
    }


def load_into(model: PreTrainedModel, weights: dict[str, Tensor]) -> Any:
    """The model with those weights, by canonical name."""
    state = {hf_name(name): tensor.clone() for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model.eval()


def export_checkpoint(run: Path, output: Path) -> None:
    """Export a run's latest checkpoint with its tokenizer, in float32."""
    checkpoint = Checkpoint(run)
    export_model(
        checkpoint.model_config,
        checkpoint.weight_names(),
        checkpoint.weight,
        checkpoint.tokenizer_file,
        output,
        training=Training.of(checkpoint),
        dtype=torch.float32,
    )


def published(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A checkpoint as others publish it: by `save_pretrained` of the plain class."""
    model = load_into(AutoModelForCausalLM.from_config(hf_config(config, dtype, {})), random_weights(config)).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = stored(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def routed_model(config: ModelConfig, weights: dict[str, Tensor] | None = None) -> Any:
    """Our class of transformers."""
    ids = {"pad_token_id": 0}
    model = CLASSES[config.architecture].routed(hf_config(config, torch.float32, ids))
    return load_into(model, weights or random_weights(config))


def prompts() -> Tensor:
    """int [16, 12]."""
    return torch.randint(1, 101, (16, 12), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def reference_tokens(
    config: ModelConfig, retained: tuple[int, ...], inputs: Tensor, count: int, scale: float = 0.3
) -> Tensor:
    """Inputs int [B, S] and `count` greedy tokens, without a cache, by the reference that shares no code with us.

    The weights are `random_weights` of that scale. The reference reads a guess of all tokens at once. What it says is
    greedy as far as the guess was, and one token further: so it is asked again until the guess is what it says. A wrong
    guess costs time, and changes nothing.
    """
    weights, shape = random_weights(config, scale), config.model_dump()
    sources = list(CacheStrategy(config.num_hidden_layers, retained).kv_source_layers)
    first, guess = inputs.shape[1] - 1, _guessed_tokens(config, weights, sources, inputs, count)
    for _ in range(count + 1):
        said = reference.logits(weights, shape, guess[:, :-1], sources)[:, first:].argmax(-1)
        if torch.equal(said, guess[:, first + 1 :]):
            return guess
        guess = torch.cat((inputs, said), dim=1)
    raise AssertionError("the reference does not agree with itself: rounding decides between two tokens")


def _guessed_tokens(
    config: ModelConfig, weights: dict[str, Tensor], sources: list[int], inputs: Tensor, count: int
) -> Tensor:
    """Greedy tokens of our decoder, which has a cache."""
    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    held: dict[int, KV] = {}
    new, found = inputs, inputs
    for _ in range(count):
        new = decoder(new, sources, held)[:, -1].argmax(-1, keepdim=True)
        found = torch.cat((found, new), dim=1)
    return found
