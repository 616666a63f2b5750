"""The training loop that users would write without this project: transformers' model in DeepSpeed's engine."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.optimizer import build_optimizer, build_scheduler


class PlainLoop:
    """Steps of the same model with the same optimizer, precision and ZeRO stage, without routing; data-parallel alone.

    It stands for what people have: attention by SDPA, the loss by transformers, nothing compiled. Collective to make.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        torch.manual_seed(config.train.seed)
        shape = hf_config(config.model, torch.float32, {})
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
        options = deepspeed_json(config, mesh.world_size)
        options["zero_optimization"]["stage"] = config.parallel.zero_stage  # as its user would write it
        parameters = [{"params": [each for each in model.parameters() if each.requires_grad]}]
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameters,
            optimizer=functools.partial(build_optimizer, config.train),
            lr_scheduler=functools.partial(build_scheduler, config.train),
            config=options,
        )
        self._passes = config.num_micro_batches // mesh.dp_size

    def step(self, batches: Iterator[MicroBatch]) -> float:
        """One optimizer step; returns the mean loss of its micro-batches."""
        losses = []
        for _ in range(self._passes):
            tokens = next(batches).tokens.to(self._engine.device)
            loss = self._engine(input_ids=tokens, labels=tokens).loss  # transformers shifts the labels itself
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        return math.fsum(torch.stack(losses).tolist()) / len(losses)
