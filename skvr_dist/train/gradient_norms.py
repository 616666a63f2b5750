"""The gradient norm of every layer, of the embedding, the last norm and the head: the same in every layout.

Each rank has the gradients of its shards put together over the replicas, one after the other, as the optimizer is about
to use them (before clipping); what several ranks hold counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from skvr_dist.config.tree import Config
from skvr_dist.model.trained import is_trained, parameter_names
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.gradients import gather_gradient


class LayerGradientNorms:
    """Measures the gradients of a run's steps, where asked.

    Args:
        every_steps: steps between two measurements; None: never.
    """

    def __init__(self, engine: RoutedPipelineEngine, config: Config, every_steps: int | None) -> None:
        self._engine, self._every_steps = engine, every_steps
        names = parameter_names(config.model)
        self._places = list(dict.fromkeys(place_of(name) for name in names if is_trained(name, config.train.only)))
        self._values: dict[str, float] = {}

    def begin_step(self, step: int) -> None:
        """Prepare for a step, counted from 1."""
        self._values = {}
        due = self._every_steps is not None and step % self._every_steps == 0
        self._engine.before_update = self._measure if due else None

    def values(self) -> dict[str, float]:
        """What is reported of the step; nothing where it was not measured."""
        return self._values

    @torch.no_grad()
    def _measure(self) -> None:
        """Collective over all ranks."""
        engine, shards = self._engine, self._engine.stage.shards
        squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=engine.device))
        for name, parameter in engine.stage.decoder.named_parameters():
            if parameter.requires_grad:
                gradient = gather_gradient(parameter)  # of all replicas, each of which takes part
                if shards[name].primary and engine.mesh.dp_rank == 0:
                    squares[place_of(name)] += shards[name].unpadded(gradient).float().square().sum()
        mine = torch.stack([squares[place] for place in self._places]).tolist()
        sums = engine.mesh.host_group.sum(mine)
        self._values = {
            f"gradient_norm/{place}": math.sqrt(each) for place, each in zip(self._places, sums, strict=True)
        }


def place_of(parameter: str) -> str:
    """Where a parameter is, by its canonical name: `layer_N`, or the module that is none of a layer."""
    first, second = parameter.split(".")[:2]
    return f"layer_{second}" if first == "layers" else first
