"""Training a part of a decoder: which parameters, by the names of the modules that they are in."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from skvr_dist.config.model import ModelConfig
from skvr_dist.model.decoder import Decoder


def is_trained(parameter: str, only: Collection[str] | None) -> bool:
    """Whether a parameter, by its canonical name, is in one of the modules that are trained; None trains all."""
    return only is None or not set(only).isdisjoint(parameter.split(".")[:-1])


def train_only(decoder: nn.Module, only: Collection[str] | None) -> None:
    """Let the other parameters take no gradient."""
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(is_trained(name, only))


def module_names(parameters: Iterable[str]) -> list[str]:
    """The names by which modules can be told, in the order of the decoder: `k_proj`, `mlp`, `lm_head` and so on."""
    parts = [part for name in parameters for part in name.split(".")[:-1]]
    return [part for part in dict.fromkeys(parts) if part != "layers" and not part.isdigit()]


def parameter_names(model: ModelConfig, start: int = 0, stop: int | None = None) -> list[str]:
    """Canonical names of the parameters of layers `start` to `stop` of a decoder, with what lies around them."""
    with torch.device("meta"):
        return [name for name, _ in Decoder(model, start, stop).named_parameters()]
