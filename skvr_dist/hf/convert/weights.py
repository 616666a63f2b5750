"""Weights under their Hugging Face names, read and written tensor by tensor.

Our canonical names are those of transformers without the leading `model.`. Every layer's key and value projections
stay in the files, so that the same weights serve any cache strategy, unless an export is pruned to one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy

WeightReader = Callable[[str], Tensor]
"""Returns the whole tensor of a canonical name."""


def hf_name(name: str) -> str:
    """transformers' name of a canonical parameter name."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def parameter_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Canonical name and shape of every parameter that transformers' model has, in its order; a tied head has none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name.removeprefix("model."): tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def pruned_names(strategy: CacheStrategy) -> set[str]:
    """Canonical names of the parameters that a strategy never uses."""
    readers = set(range(strategy.num_layers)) - set(strategy.retained)
    parts = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight")
    return {f"layers.{layer}.self_attn.{part}" for layer in readers for part in parts}


def check_names(names: Collection[str], shapes: dict[str, torch.Size], architecture: str, way_out: str) -> None:
    """Raises `UserError`, which ends in `way_out`, unless the weights are exactly those of the architecture."""
    missing = [name for name in shapes if name not in names]
    unexpected = [name for name in names if name not in shapes]
    if missing or unexpected:
        parts = [
            f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            for what, found in (("missing", missing), ("unexpected", unexpected))
            if found
        ]
        raise UserError(
            f"the weights are not those of a {architecture} model of this configuration: {' and '.join(parts)}; "
            f"{way_out}"
        )


def write_weights(
    folder: Path,
    shapes: dict[str, torch.Size],
    weight: WeightReader,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str,
) -> None:
    """Write safetensors files of at most `max_shard_size`, with an index when there are several.

    One file's tensors are in memory at a time.

    Raises:
        UserError: a weight has another shape than transformers expects, or holds NaN or infinities.
    """
    stored = {hf_name(name): torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)
    canonical = {hf_name(name): name for name in shapes}
    with tqdm(total=len(shapes), desc="writing weights", unit="tensor", disable=None) as progress:
        for file, members in split.filename_to_tensors.items():
            tensors = {}
            for member in members:
                name = canonical[member]
                tensors[member] = _checked(name, weight(name), shapes[name]).to(dtypes[name]).contiguous()
                progress.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise UserError(
            f"weight {name} has shape {list(tensor.shape)}, but this configuration makes it {list(shape)}; "
            f"export with the model section that the weights were trained with"
        )
    if not tensor.isfinite().all():
        raise UserError(f"weight {name} holds NaN or infinite values; export a checkpoint from before the divergence")
    return tensor
