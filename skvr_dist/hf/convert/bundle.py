"""What an export brings along to run at any strategy: what `config.json` says of routing, and code that reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

import skvr_dist
from skvr_dist.hf.convert.card import Training
from skvr_dist.routing import CacheStrategy

# Our modules, and the files they become beside the weights. They import one another and nothing else of ours.
_FILES = {
    "skvr_dist.errors": "skvr_errors.py",
    "skvr_dist.routing.strategy": "skvr_strategy.py",
    "skvr_dist.hf.model.cache_config": "configuration_skvr.py",
    "skvr_dist.hf.model.layers": "skvr_layers.py",
    "skvr_dist.hf.model.causal_lm": "modeling_skvr.py",
}


CODE_FILES = tuple(_FILES.values())
"""The code files of an export."""


def add_code(folder: Path, config: PreTrainedConfig, architecture: str) -> None:
    """Copy the code that `trust_remote_code=True` runs, so that it needs transformers alone, and refer to it.

    Args:
        folder: of the checkpoint.
        config: its configuration, which gets an `auto_map`.
        architecture: the class of the model.
    """
    root = Path(skvr_dist.__file__).parent.parent
    for module, name in _FILES.items():
        text = (root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for other, file in _FILES.items():
            text = text.replace(f"from {other} import", f"from .{file.removesuffix('.py')} import")
        (folder / name).write_text(
            f"# Part of skvr_dist {skvr_dist.__version__}, Apache-2.0.\n{text}", encoding="utf-8"
        )
    config.auto_map = {"AutoModelForCausalLM": f"modeling_skvr.{architecture}"}
    if type(config).__name__.startswith("Pruned"):
        config.auto_map["AutoConfig"] = f"configuration_skvr.{type(config).__name__}"


def describe_routing(config: PreTrainedConfig, training: Training) -> None:
    """Write into a configuration which profiles it has, and how it was trained."""
    config.kv_profiles = servable(training.profiles, config.num_hidden_layers, getattr(config, "kv_pruned_to", None))
    config.kv_training = training.routing.model_dump(exclude_defaults=True)
    if training.retention_table:
        config.kv_training["retention_table"] = training.retention_table


def servable(profiles: Mapping[str, str], num_layers: int, pruned_to: Collection[int] | None) -> dict[str, str]:
    """Those of the profiles that retain none of the layers that were pruned."""
    if pruned_to is None:
        return dict(profiles)
    strategies = CacheStrategy.parse_all(profiles.values(), num_layers)
    return {name: spec for name, spec in profiles.items() if set(strategies[spec].retained) <= set(pruned_to)}
