"""What a Hugging Face configuration says about the cache: which layer each layer reads.

    kv_profiles       named strategies that the checkpoint was published with, as `CacheStrategy.parse` reads them
    kv_profile        the strategy to run: one of those names, or a strategy such as every:4
    kv_source_layers  the same as a full map, one source per layer; `kv_profile` decides where both are given
    kv_training       the routing that the checkpoint was trained with, and its retention table if one was measured
    kv_pruned_to      the layers whose key and value projections are stored, if not all are

Without `kv_profile` and `kv_source_layers` a model runs at full retention. This file travels inside exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

from skvr_dist.errors import UserError
from skvr_dist.routing.strategy import CacheStrategy, layer_numbers

logger = logging.get_logger(__name__)

Sources = tuple[int, ...]
"""The layer that each layer reads, [L]: itself if it keeps a cache."""


def sources_of(
    config: PreTrainedConfig, kv_profile: str | None = None, kv_source_layers: Sequence[int] | None = None
) -> Sources:
    """The layer that each layer reads; arguments override the configuration.

    Raises:
        UserError: an unknown profile, a strategy that is impossible for this many layers, or one that was pruned; or a
            profile of the configuration is impossible, whether it is asked for or not.
    """
    profiles = _profiles(config)
    if kv_profile is None and kv_source_layers is None:
        kv_profile = getattr(config, "kv_profile", None)
        kv_source_layers = getattr(config, "kv_source_layers", None)
    layers = config.num_hidden_layers
    if kv_profile is not None:
        sources = CacheStrategy.parse(strategy_text(kv_profile), layers, profiles).kv_source_layers
    else:
        sources = tuple(range(layers)) if kv_source_layers is None else _checked(kv_source_layers, layers)
    _require_stored(config, sources)
    return sources


def strategy_text(given: Any) -> str:
    """A profile or a strategy as `CacheStrategy.parse` reads it, also of a list of the retained layers."""
    try:
        return ",".join(map(str, layer_numbers(given)))
    except UserError:
        return str(given)


def _profiles(config: PreTrainedConfig) -> dict[str, str]:
    """The named strategies of a configuration, each of them possible.

    Raises:
        UserError: one is not.
    """
    profiles = getattr(config, "kv_profiles", None) or {}
    if not isinstance(profiles, dict):
        raise UserError(f"kv_profiles {profiles!r} must name strategies, as {{'half': 'every:2'}} does")
    for name, spec in profiles.items():
        try:
            CacheStrategy.parse(str(spec), config.num_hidden_layers)
        except UserError as error:
            raise UserError(f"kv_profiles: {name} cannot be: {error}") from None
    return profiles


def _require_stored(config: PreTrainedConfig, sources: Sources) -> None:
    """Raises `UserError` if a layer that is read was pruned from the checkpoint."""
    pruned_to = getattr(config, "kv_pruned_to", None)
    stored = range(config.num_hidden_layers) if pruned_to is None else _pruned_to(pruned_to)
    missing = sorted(set(sources) - set(stored))
    if missing:
        raise UserError(
            f"layer {missing[0]} was pruned from this checkpoint and cannot keep a cache; retain some of layers "
            f"{list(stored)}, or load the whole checkpoint"
        )


def _pruned_to(given: Any) -> Sequence[int]:
    try:
        return layer_numbers(given)
    except UserError:
        raise UserError(
            f"kv_pruned_to {given!r} must be a list of layer numbers; export the checkpoint again"
        ) from None


def _checked(given: Any, layers: int) -> Sources:
    try:
        sources = layer_numbers(given)
    except UserError:
        raise UserError(
            f"kv_source_layers {given!r} must be a list of layer numbers, one for each of {layers} layers"
        ) from None
    if len(sources) != layers:
        raise UserError(
            f"kv_source_layers names {len(sources)} sources, but the model has {layers} layers; name one for each layer"
        )
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer:
            raise UserError(
                f"kv_source_layers: layer {layer} cannot read layer {source}; its source must be one of 0 to {layer}"
            )
        if sources[source] != source:
            raise UserError(
                f"kv_source_layers: layer {layer} reads layer {source}, which keeps no cache but reads layer "
                f"{sources[source]}; name layer {sources[source]}, or let layer {source} read itself"
            )
    return sources


def warn_if_untrained(config: PreTrainedConfig, sources: Sources) -> None:
    """Warn, once in a process, when layers share a cache in a model that was never trained for it.

    Raises:
        UserError: what the configuration says of the training cannot be read.
    """
    training = getattr(config, "kv_training", None) or {}
    if not isinstance(training, dict):
        raise UserError(f"kv_training {training!r} must say how routing was trained, as {{'policy': 'uniform'}} does")
    if sources == tuple(range(len(sources))) or training.get("policy", "none") != "none":
        return
    table = training.get("retention_table")
    logger.warning_once(
        "%d of %d layers keep a cache, but this checkpoint was not trained with stochastic KV routing: expect worse "
        "text%s",
        len(set(sources)),
        len(sources),
        f"; measured:\n{table}" if table else ", and measure it before you use it",
    )


# A pruned checkpoint lacks projections that the plain architecture needs: types of their own keep plain loaders off it.
class PrunedQwen3Config(Qwen3Config):
    """Qwen3 with the projections of layers `kv_pruned_to` alone."""

    model_type = "skvr_qwen3"


class PrunedQwen2Config(Qwen2Config):
    """Qwen2 with the projections of layers `kv_pruned_to` alone."""

    model_type = "skvr_qwen2"


class PrunedLlamaConfig(LlamaConfig):
    """Llama with the projections of layers `kv_pruned_to` alone."""

    model_type = "skvr_llama"


class PrunedMistralConfig(MistralConfig):
    """Mistral with the projections of layers `kv_pruned_to` alone."""

    model_type = "skvr_mistral"
