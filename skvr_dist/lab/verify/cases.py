"""What the parity matrix runs: a small decoder, its batches, and the layouts it is trained on.

Everything is as small as it can be while every path is taken: an odd vocabulary that two ranks must pad, fewer
key/value heads than four ranks, layers that do not divide evenly over four stages, gradients that are clipped.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from skvr_dist.config.layouts import why_not
from skvr_dist.config.load import validate_config
from skvr_dist.config.model import AttentionName
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import IGNORED, MicroBatch

SHAPE: dict[str, Any] = {
    "architecture": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
    "tie_word_embeddings": False,
}
# Of the four frequencies that a head of 8 has here, one is kept, one falls between and two are stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"architecture": "qwen2", "qk_norm": False, "attention_bias": True},
    "llama": {"architecture": "llama", "qk_norm": False, "attention_bias": True},
}
"""Keys in which the shape of each family differs from `SHAPE`."""
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "uniform": {"cross_layer_prob": 0.6},
    "strategy": {"cross_layer_prob": 0.5},
    "window": {"cross_layer_prob": 0.7, "window": 2},
    "cla": {"group_size": 2},
    "rd_cla": {"group_size": 3, "cross_layer_prob": 0.5},
}
DISTILLATIONS: dict[str, dict[str, Any]] = {
    "self": {"teacher": "self", "weight": 0.4, "temperature": 2.0},
    # The target runs forwards only, and half of the micro-batches are not distilled.
    "forwards only": {
        "teacher": "self",
        "weight": 0.7,
        "share": 0.5,
        "full_weight": 0.0,
        "passes": ["routed", "prefix:1"],
    },
}
"""Sections that a case may distil with."""
CHOICES: dict[str, tuple[str, ...]] = {
    "policy": tuple(POLICIES),
    "family": tuple(FAMILIES),
    "attention": get_args(AttentionName),
    "compile": ("off", "aot_eager", "inductor"),
    "draws_per": ("micro_batch", "sequence"),
}
"""What a whole matrix may be trained with instead (`tools/verify.py layouts --set`), by the field of `Case`."""
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "layer": {"recompute": "layer"},
    "every 2nd layer": {"recompute": "layer", "every": 2},
    "attention": {"recompute": "attention"},
}
SEED, MICRO_BATCHES, BATCH, SEQUENCE = 7, 4, 2, 12
# Labels of each sequence of a step's four micro-batches, of every 12; in the next step they move on by one sequence.
# Micro-batches differ in their number of labels, and so do replicas; one has none.
RAGGED = (12, 1, 7, 2, 0, 0, 3, 12)
END = 5
"""The token that ends documents, where they are separate."""
# Adam divides a gradient by its own size: eps keeps it from blowing up the rounding of gradients that are nearly
# zero (a bias on all keys hardly changes a softmax), so that weights can be compared as tightly as gradients. Cases
# with the usual eps go without this help (see `skvr_dist.lab.verify.compare`).
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
CLIP = 0.5  # below the norms that occur, so clipping is at work


@dataclass(frozen=True)
class Layout:
    """A way to lay the decoder out over ranks."""

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    brief: bool = False
    """Whether a few cases are enough, since another layout takes the same paths but one."""


# On so small a model ZeRO-3 would keep everything on every rank.
_PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
_OFFLOAD: dict[str, Any] = {
    "zero_optimization": {**_PARTITION_ALL["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
}
_TP2_SP = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("single", 1, {"zero_stage": 0}),
        Layout("DP2 ZeRO-0", 2, {"zero_stage": 0}),
        Layout("DP2 ZeRO-1", 2, {"zero_stage": 1}),
        Layout("DP2 ZeRO-2", 2, {"zero_stage": 2}),
        Layout("DP2 ZeRO-3", 2, {"zero_stage": 3}, _PARTITION_ALL),
        Layout("DP2 ZeRO-3 offload", 2, {"zero_stage": 3}, _OFFLOAD),
        Layout("TP2", 2, {"tensor": 2, "zero_stage": 0}),
        Layout("TP2 SP", 2, _TP2_SP),
        Layout("TP4 SP", 4, {"tensor": 4, "sequence_parallel": True}),
        Layout("PP2", 2, {"pipeline": 2, "zero_stage": 0}),
        Layout("PP4 uneven", 4, {"pipeline": 4, "stage_layers": [1, 2, 1, 1]}),
        Layout("PP2xDP2 ZeRO-1", 4, {"pipeline": 2}),
        Layout("PP2xDP2 ZeRO-3", 4, {"pipeline": 2, "zero_stage": 3}, _PARTITION_ALL),
        Layout("TP2xPP2", 4, {"tensor": 2, "pipeline": 2}),
        Layout("TP2xDP2 ZeRO-3", 4, {"tensor": 2, "zero_stage": 3}, _PARTITION_ALL),
        Layout("TP2xPP2xDP2 ZeRO-1", 8, {"tensor": 2, "pipeline": 2}),
        Layout(
            "TP2xPP2xDP2 SP ZeRO-3",
            8,
            {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "zero_stage": 3},
            _PARTITION_ALL,
        ),
        Layout("DP2 ZeRO-1 offload", 2, {"zero_stage": 1}, _OFFLOAD, brief=True),
        Layout("DP2 ZeRO-2 offload", 2, {"zero_stage": 2}, _OFFLOAD, brief=True),
        Layout("PP2xDP2 ZeRO-1 offload", 4, {"pipeline": 2}, _OFFLOAD, brief=True),
        Layout("PP2xDP2 ZeRO-3 offload", 4, {"pipeline": 2, "zero_stage": 3}, _OFFLOAD, brief=True),
        # More tensor-parallel ranks than key/value heads: copies of a head cross the boundary too.
        Layout("TP4xPP2", 8, {"tensor": 4, "pipeline": 2}, brief=True),
        Layout("TP4xPP2xDP2", 16, {"tensor": 4, "pipeline": 2}, brief=True),
        Layout("PP4xDP4", 16, {"pipeline": 4}, brief=True),
        # Gradients that tensor-parallel ranks sum once in a step are parts of partitions by then, or on the host.
        Layout("TP2xDP2 SP ZeRO-2", 4, {**_TP2_SP, "zero_stage": 2}, brief=True),
        Layout("TP2xDP2 SP ZeRO-2 offload", 4, {**_TP2_SP, "zero_stage": 2}, _OFFLOAD, brief=True),
        Layout("TP2xDP2 SP ZeRO-3 offload", 4, {**_TP2_SP, "zero_stage": 3}, _OFFLOAD, brief=True),
    )
}


_ALWAYS_NAMED = ("layout", "policy", "checkpointing", "tied")


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
    compile: str = "off"
    ragged: bool = False
    """Whether sequences have labels at their beginning only, from all to none of them (`RAGGED`)."""
    documents: str = "joined"
    rope_scaling: bool = False
    """Whether frequencies are scaled as in Llama 3.1."""
    sequence: int = SEQUENCE
    learning_rate: float = OPTIMIZER["lr"]
    warmup_steps: int = 0
    min_learning_rate_ratio: float = 1.0
    learning_rate_decay: str = "cosine"
    decay_steps: int | None = None
    rising: bool = False
    """Whether the probability of cross-layer reads rises from step to step, with some micro-batches at full retention,
    under a policy that draws anything."""
    draws_per: str = "micro_batch"
    """What draws donors of its own, under a policy that draws anything."""
    distillation: str = ""
    """The name of one of `DISTILLATIONS`."""
    adam_eps: float = OPTIMIZER["eps"]
    clip: float = CLIP
    steps: int = 3
    initializer_range: float = 0.1  # large enough that every gradient is well above rounding

    @property
    def name(self) -> str:
        """The case in words, which `tools/verify.py layouts --only` searches."""
        words = [self.layout, self.policy, f"checkpointing {self.checkpointing}", "tied" if self.tied else "untied"]
        return ", ".join([*words, *self.also])

    @property
    def also(self) -> list[str]:
        """The other fields in which the case differs from their defaults."""
        fields = [each for each in dataclasses.fields(self) if each.name not in _ALWAYS_NAMED]
        values = [(each.name, getattr(self, each.name), each.default) for each in fields]
        return [name if value is True else f"{name} {value}" for name, value, usual in values if value != usual]

    @property
    def on_one_rank(self) -> Case:
        """The case reduced to what changes the training: equal for all layouts and all ways to compute it."""
        return dataclasses.replace(self, layout="single", checkpointing="none", attention="sdpa", compile="off")

    @property
    def shape(self) -> dict[str, Any]:
        """The model section."""
        own = {"tie_word_embeddings": self.tied, "attention": self.attention}
        rope = {"rope_scaling": LLAMA3_ROPE} if self.rope_scaling else {}
        return {**SHAPE, **FAMILIES[self.family], **own, **rope, "initializer_range": self.initializer_range}

    @property
    def routing(self) -> dict[str, Any]:
        """The routing section."""
        parameters = POLICIES[self.policy]
        if self.rising and "cross_layer_prob" in parameters:
            rise = {"points": [[0.0, 0.1], [0.6, parameters["cross_layer_prob"]]]}
            parameters = {**parameters, "cross_layer_prob": rise, "full_retention_share": 0.25}
        if "cross_layer_prob" in parameters:
            parameters = {**parameters, "draws_per": self.draws_per}
        return {"policy": self.policy, **parameters}

    @property
    def rows(self) -> int:
        """Rows of donors that a micro-batch has."""
        return BATCH if self.routing.get("draws_per") == "sequence" else 1

    @property
    def separate_at(self) -> int | None:
        """The token that ends documents, where they are separate."""
        return END if self.documents == "separate" else None

    def config(self) -> Config:
        """The configuration of a run that trains this case; its data sets are not opened."""
        layout = LAYOUTS[self.layout]
        return validate_config(
            {
                "model": self.shape,
                "routing": self.routing,
                "parallel": {
                    **layout.parallel,
                    "activation_checkpointing": CHECKPOINTING[self.checkpointing],
                    "compile": self.compile,
                },
                "data": {
                    "train": "",
                    "validation": "",
                    "tokenizer": "",
                    "sequence_length": self.sequence,
                    "documents": self.documents,
                },
                "train": {
                    "output_dir": "",
                    "seed": SEED,
                    "steps": self.steps,
                    "global_batch_size": MICRO_BATCHES * BATCH,
                    "micro_batch_size": BATCH,
                    "precision": self.precision,
                    "learning_rate": self.learning_rate,
                    "min_learning_rate_ratio": self.min_learning_rate_ratio,
                    "warmup_steps": self.warmup_steps,
                    "learning_rate_decay": self.learning_rate_decay,
                    "decay_steps": self.decay_steps,
                    "adam_beta1": OPTIMIZER["betas"][0],
                    "adam_beta2": OPTIMIZER["betas"][1],
                    "adam_eps": self.adam_eps,
                    "weight_decay": OPTIMIZER["weight_decay"],
                    "gradient_clipping": self.clip,
                },
                "deepspeed": layout.deepspeed,
                "distillation": DISTILLATIONS[self.distillation] if self.distillation else None,
            }
        )

    def distilled(self) -> list[list[bool]]:
        """Which micro-batches of every step are distilled, [steps][Q]: all, or the halves of the batch in turn."""
        halves = "share" in DISTILLATIONS.get(self.distillation, {})
        return [
            [
                bool(self.distillation) and (not halves or (q < MICRO_BATCHES // 2) == (step % 2 == 0))
                for q in range(MICRO_BATCHES)
            ]
            for step in range(self.steps)
        ]

    def batches(self) -> list[Tensor]:
        """The global batch of every step, int [Q, B, S + 1]; with ends of documents where they are separate."""
        if self.separate_at is None:
            return batches(self.steps, self.sequence)
        generator = torch.Generator().manual_seed(2)
        plain = batches(self.steps, self.sequence)
        return [batch.masked_fill(torch.rand(batch.shape, generator=generator) < 0.15, END) for batch in plain]

    def labelled(self) -> list[Tensor]:
        """Which tokens of `batches`, but the first of each sequence, are to be predicted: per step, bool [Q, B, S]."""
        masks = []
        for step in range(self.steps):
            lengths = torch.tensor(RAGGED).roll(step) if self.ragged else torch.full((len(RAGGED),), SEQUENCE)
            labels = lengths.view(MICRO_BATCHES, BATCH, 1) * self.sequence // SEQUENCE
            masks.append(torch.arange(self.sequence) < labels)
        return masks

    @property
    def evaluated(self) -> list[int]:
        """Donors of the cache strategy that is evaluated before the first step: every other layer keeps a cache."""
        return [layer // 2 * 2 for layer in range(self.shape["num_hidden_layers"])]

    def micro_batches(self) -> list[list[MicroBatch]]:
        """The Q micro-batches of every step, as the data path hands them over."""
        steps = []
        for batch, masks in zip(self.batches(), self.labelled(), strict=True):
            whole = [MicroBatch.of(tokens, self.separate_at) for tokens in batch]
            pairs = zip(whole, masks, strict=True)
            steps.append([each._replace(labels=each.labels.masked_fill(~mask, IGNORED)) for each, mask in pairs])
        return steps


def batches(steps: int, sequence: int = SEQUENCE) -> list[Tensor]:
    """The global batch of every step, int [Q, B, S + 1]."""
    generator = torch.Generator().manual_seed(1)
    shape = (MICRO_BATCHES, BATCH, sequence + 1)
    return [torch.randint(0, SHAPE["vocab_size"], shape, generator=generator) for _ in range(steps)]


_SCHEDULES = {"warmup_steps": 2, "min_learning_rate_ratio": 0.1, "rising": True, "steps": 5}
# bf16 is judged by sums over the steps, which twelve make sharp enough (`skvr_dist.lab.verify.compare`); with a larger
# learning rate the training itself would drift away from the reference's, as far as gradients are rounded.
BF16: dict[str, Any] = {"precision": "bf16", "steps": 12, "learning_rate": 1e-4}
VARIATIONS: dict[str, dict[str, Any]] = {
    "ragged labels": {"ragged": True},
    "separate documents": {"documents": "separate"},
    "schedules": _SCHEDULES,
    "usual eps": {"adam_eps": 1e-8},
    "no clipping": {"clip": 0.0},
    "llama3 rope": {"family": "llama", "rope_scaling": True},
    "context 128": {"sequence": 128},
    "bf16": BF16,
    "all at once": {
        "ragged": True,
        "documents": "separate",
        "adam_eps": 1e-8,
        "clip": 0.0,
        "family": "llama",
        "rope_scaling": True,
        "sequence": 128,
        **_SCHEDULES,
        "learning_rate_decay": "linear",
        "decay_steps": 2,
    },
}


def varied(case: Case, variation: str) -> Case:
    """A case with one of `VARIATIONS`; as it was where its layout has no bf16."""
    parallel = Case(case.layout).config().parallel
    if variation == "bf16" and why_not(parallel.zero_stage, parallel.pipeline > 1, "bf16"):
        return case
    return dataclasses.replace(case, **VARIATIONS[variation])


def full_matrix() -> list[Case]:
    """Every layout, with policies, kinds of checkpointing and kinds of embedding combined.

    Each layout also trains once over 20 steps, once a Qwen2, which has biases on queries, keys and values alone, twice
    with distillation, and twice with donors of each sequence, once of them with distillation.
    Each case with checkpointing has another variation, which meets another policy and kind in each layout.
    """
    policies, tied = ("none", "uniform", "strategy"), itertools.cycle((True, False))
    kinds = [kind for kind in CHECKPOINTING if kind != "none"]
    cases = []
    for number, layout in enumerate(layout for layout in LAYOUTS if not LAYOUTS[layout].brief):
        cases += [Case(layout, policy, tied=both) for policy in policies for both in (False, True)]
        names = itertools.islice(itertools.cycle(VARIATIONS), number, None)
        for policy, kind in itertools.product(policies, kinds):
            cases.append(varied(Case(layout, policy, kind, next(tied)), next(names)))
        cases.append(Case(layout, steps=20))
        cases.append(Case(layout, family="qwen2", tied=number % 2 == 1))
        cases.append(Case(layout, "strategy", ragged=True, tied=number % 2 == 0, distillation="self"))
        cases.append(Case(layout, "uniform", "layer", documents="separate", distillation="forwards only"))
        kind, policy = (kinds[number % 3], policies[1:][number % 2])
        cases.append(Case(layout, policy, kind, number % 2 == 0, draws_per="sequence"))
        cases.append(Case(layout, documents="separate", distillation="self", draws_per="sequence"))
    for layout in (layout for layout in LAYOUTS if LAYOUTS[layout].brief):
        cases += [Case(layout), Case(layout, "strategy", "layer", tied=True, ragged=True)]
        cases.append(Case(layout, draws_per="sequence"))
        cases += [varied(Case(layout, tied=True), variation) for variation in ("bf16", "all at once")]
    return cases


def quick_matrix() -> list[Case]:
    """Every layout twice, so that all policies, kinds of checkpointing and both kinds of embedding take their turns.

    The second case has a variation. Brief layouts are there once, and only if four ranks are enough. Four cases distil,
    and in two each sequence has donors of its own.
    """
    policies = itertools.cycle(("uniform", "strategy", "uniform", "none"))
    kinds = itertools.cycle(("none", "layer", "attention", "every 2nd layer"))
    tied = itertools.cycle((True, False, False))
    names = itertools.cycle(VARIATIONS)
    cases = []
    for layout in LAYOUTS.values():
        plain = [Case(layout.name, next(policies), next(kinds), next(tied)) for _ in range(2)]
        if not layout.brief:
            cases += [plain[0], varied(plain[1], next(names))]
        elif layout.ranks <= 4:
            cases.append(dataclasses.replace(plain[0], ragged=True))
    cases += [Case(layout, "strategy", ragged=True, distillation="self") for layout in ("DP2 ZeRO-2", "TP2xPP2")]
    cases += [
        Case(layout, documents="separate", tied=True, distillation="forwards only")
        for layout in ("PP4 uneven", "DP2 ZeRO-3")
    ]
    return [
        *cases,
        Case("TP2xPP2", "uniform", "attention", tied=True, documents="separate", draws_per="sequence"),
        Case("PP2xDP2 ZeRO-3", "uniform", "layer", distillation="self", draws_per="sequence"),
    ]
