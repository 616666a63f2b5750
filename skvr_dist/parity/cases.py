"""What the parity matrix runs: a small decoder, its batches, and the layouts it is trained on.

Everything is as small as it can be while every path is taken: an odd vocabulary that two ranks must pad, fewer
key/value heads than four ranks, layers that do not divide evenly over four stages, gradients that are clipped.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.train.config import Config
from skvr_dist.train.load_config import validate_config

SHAPE: dict[str, Any] = {
    "architecture": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
    "tie_word_embeddings": False,
}
LLAMA = {"architecture": "llama", "qk_norm": False, "attention_bias": True}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "uniform": {"cross_layer_prob": 0.6},
    "strategy": {"cross_layer_prob": 0.5},
    "window": {"cross_layer_prob": 0.7, "window": 2},
    "cla": {"group_size": 2},
    "rd_cla": {"group_size": 3, "cross_layer_prob": 0.5},
}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "layer": {"recompute": "layer"},
    "every 2nd layer": {"recompute": "layer", "every": 2},
    "attention": {"recompute": "attention"},
}
SEED, MICRO_BATCHES, BATCH, SEQUENCE = 7, 4, 2, 12
# Adam divides a gradient by its own size: eps keeps it from blowing up the rounding of gradients that are nearly
# zero (a bias on all keys hardly changes a softmax), so that weights can be compared as tightly as gradients.
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
# Labels of each sequence of a step's four micro-batches; in the next step they move on by one sequence. Micro-batches
# differ in their number of labels, and so do replicas; one has none.
RAGGED = (12, 1, 7, 2, 0, 0, 3, 12)
CLIP = 0.5  # below the norms that occur, so clipping is at work


@dataclass(frozen=True)
class Layout:
    """A way to lay the decoder out over ranks."""

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)


# On so small a model ZeRO-3 would keep everything on every rank.
_PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
_OFFLOAD = {"zero_optimization": {**_PARTITION_ALL["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}
_TP2_SP = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("single", 1, {"zero_stage": 0}),
        Layout("DP2 ZeRO-0", 2, {"zero_stage": 0}),
        Layout("DP2 ZeRO-1", 2, {"zero_stage": 1}),
        Layout("DP2 ZeRO-2", 2, {"zero_stage": 2}),
        Layout("DP2 ZeRO-3", 2, {"zero_stage": 3}, _PARTITION_ALL),
        Layout("DP2 ZeRO-1 offload", 2, {"zero_stage": 1}, _OFFLOAD),
        Layout("DP2 ZeRO-2 offload", 2, {"zero_stage": 2}, _OFFLOAD),
        Layout("DP2 ZeRO-3 offload", 2, {"zero_stage": 3}, _OFFLOAD),
        Layout("TP2", 2, {"tensor": 2, "zero_stage": 0}),
        Layout("TP2 SP", 2, _TP2_SP),
        Layout("TP4 SP", 4, {"tensor": 4, "sequence_parallel": True}),
        Layout("PP2", 2, {"pipeline": 2, "zero_stage": 0}),
        Layout("PP4 uneven", 4, {"pipeline": 4, "stage_layers": [1, 2, 1, 1]}),
        Layout("PP2xDP2 ZeRO-1", 4, {"pipeline": 2}),
        Layout("PP2xDP2 ZeRO-3", 4, {"pipeline": 2, "zero_stage": 3}, _PARTITION_ALL),
        Layout("PP2xDP2 ZeRO-1 offload", 4, {"pipeline": 2}, _OFFLOAD),
        Layout("PP2xDP2 ZeRO-3 offload", 4, {"pipeline": 2, "zero_stage": 3}, _OFFLOAD),
        Layout("TP2xPP2", 4, {"tensor": 2, "pipeline": 2}),
        Layout("TP2xDP2 ZeRO-3", 4, {"tensor": 2, "zero_stage": 3}, _PARTITION_ALL),
        Layout("TP2xPP2xDP2 ZeRO-1", 8, {"tensor": 2, "pipeline": 2}),
        Layout(
            "TP2xPP2xDP2 SP ZeRO-3",
            8,
            {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "zero_stage": 3},
            _PARTITION_ALL,
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """One training run of the matrix."""

    layout: str
    policy: str = "uniform"
    checkpointing: str = "none"
    tied: bool = False
    family: str = "qwen3"
    precision: str = "fp32"
    attention: str = "sdpa"
    ragged: bool = False
    """Whether sequences have labels at their beginning only, from all to none of them (`RAGGED`)."""
    steps: int = 3
    initializer_range: float = 0.1  # large enough that every gradient is well above rounding

    @property
    def shape(self) -> dict[str, Any]:
        """The model section."""
        family = LLAMA if self.family == "llama" else {}
        own = {"tie_word_embeddings": self.tied, "attention": self.attention}
        return {**SHAPE, **family, **own, "initializer_range": self.initializer_range}

    def config(self) -> Config:
        """As a run would have it; its data sets are not opened."""
        layout = LAYOUTS[self.layout]
        return validate_config(
            {
                "model": self.shape,
                "routing": {"policy": self.policy, **POLICIES[self.policy]},
                "parallel": {**layout.parallel, "activation_checkpointing": CHECKPOINTING[self.checkpointing]},
                "data": {"train": "", "validation": "", "tokenizer": "", "sequence_length": SEQUENCE},
                "train": {
                    "output_dir": "",
                    "seed": SEED,
                    "steps": self.steps,
                    "global_batch_size": MICRO_BATCHES * BATCH,
                    "micro_batch_size": BATCH,
                    "precision": self.precision,
                    "learning_rate": OPTIMIZER["lr"],
                    "min_learning_rate_ratio": 1.0,
                    "adam_beta1": OPTIMIZER["betas"][0],
                    "adam_beta2": OPTIMIZER["betas"][1],
                    "adam_eps": OPTIMIZER["eps"],
                    "weight_decay": OPTIMIZER["weight_decay"],
                    "gradient_clipping": CLIP,
                },
                "deepspeed": layout.deepspeed,
            }
        )


def batches(steps: int) -> list[Tensor]:
    """The global batch of every step, int [Q, B, S + 1]."""
    generator = torch.Generator().manual_seed(1)
    shape = (MICRO_BATCHES, BATCH, SEQUENCE + 1)
    return [torch.randint(0, SHAPE["vocab_size"], shape, generator=generator) for _ in range(steps)]


def labelled(case: Case) -> list[Tensor]:
    """Which tokens of `batches` (but the first of each sequence) are to be predicted: per step, bool [Q, B, S]."""
    masks = []
    for step in range(case.steps):
        lengths = torch.tensor(RAGGED).roll(step) if case.ragged else torch.full((len(RAGGED),), SEQUENCE)
        masks.append(torch.arange(SEQUENCE) < lengths.view(MICRO_BATCHES, BATCH, 1))
    return masks


def micro_batches(case: Case) -> list[list[MicroBatch]]:
    """The Q micro-batches of every step."""
    return [
        [
            MicroBatch(tokens[:, :-1], tokens[:, 1:].masked_fill(~mask, IGNORED))
            for tokens, mask in zip(batch, masks, strict=True)
        ]
        for batch, masks in zip(batches(case.steps), labelled(case), strict=True)
    ]


def full_matrix() -> list[Case]:
    """Every layout, with policies, kinds of checkpointing and kinds of embedding combined; and once over 20 steps."""
    policies, tied = ("none", "uniform", "strategy"), itertools.cycle((True, False))
    cases = []
    for layout in LAYOUTS:
        cases += [Case(layout, policy, tied=both) for policy in policies for both in (False, True)]
        again = itertools.product(policies, [kind for kind in CHECKPOINTING if kind != "none"])
        cases += [Case(layout, policy, kind, next(tied)) for policy, kind in again]
        cases.append(Case(layout, steps=20))
    return cases


def quick_matrix() -> list[Case]:
    """Every layout twice, so that all policies, kinds of checkpointing and both kinds of embedding take their turns."""
    policies = itertools.cycle(("uniform", "strategy", "uniform", "none"))
    kinds = itertools.cycle(("none", "layer", "attention", "every 2nd layer"))
    tied = itertools.cycle((True, False, False))
    return [Case(layout, next(policies), next(kinds), next(tied)) for layout in LAYOUTS for _ in range(2)]
