"""Training a part of the parameters: the others keep their bits and cost no state, in every kind of engine."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.load import load_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.lab.verify import draws, reference
from skvr_dist.lab.verify.cases import LAYOUTS, MICRO_BATCHES, SEED, Case
from skvr_dist.lab.verify.compare import how_to_train
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.lab.verify.reshard import Trainer, checkpoint_of
from skvr_dist.model.trained import is_trained
from skvr_dist.train.inputs import require_trainable
from skvr_dist.train.state import load_state

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"
KEYS_AND_VALUES = ["k_proj", "v_proj", "k_norm"]
STEPS = 2


class PartTrainer(Trainer):
    """Of a case of which only some modules are trained."""

    def __init__(self, case: Case, folder: str, only: list[str] | None) -> None:
        super().__init__(PartCase(case, only), folder)  # type: ignore[arg-type]


class PartCase:
    """A case with `train.only`."""

    def __init__(self, case: Case, only: list[str] | None) -> None:
        self._config = case.config()
        train = self._config.train.model_copy(update={"only": only})
        self._config = self._config.model_copy(update={"train": train})

    def config(self) -> Config:
        """The configuration of a run that trains the case."""
        return self._config


def train_in_turns(case: Case, folder: str, turns: list[list[str] | None]) -> dict[str, Any]:
    """Train a few steps with each of several parts, each resumed from the one before, and look at all weights."""
    from skvr_dist.parallel.engine.optimizers import gather_parameter, optimizer_tensors

    found: dict[str, Any] = {"losses": [], "norms": [], "weights": [], "state": [], "trained": []}
    for turn, only in enumerate(turns):
        trainer = PartTrainer(case, f"{folder}/{turn}", only)
        engine, done = trainer.engine, turn * STEPS
        if turn:
            load_state(engine, Checkpoint(checkpoint_of(f"{folder}/{turn - 1}", done)))
        parameters = dict(engine.stage.decoder.named_parameters())
        found["weights"].append({name: gather_parameter(p) for name, p in parameters.items()})
        for step in range(done, done + STEPS):
            found["losses"] += trainer.train(range(step, step + 1))
            found["norms"].append(engine.gradient_norm)
        found["weights"].append({name: gather_parameter(p) for name, p in parameters.items()})
        found["state"].append(sum(tensor.numel() for tensor in optimizer_tensors(engine)))
        trained = [p for name, p in parameters.items() if is_trained(name, only)]
        found["trained"].append(sum(getattr(p, "ds_numel", p.numel()) for p in trained))
        trainer.save(done + STEPS)
        engine.destroy()
        gc.collect()
    return found


def train_reference(case: Case, turns: list[list[str] | None]) -> tuple[list[float], list[float]]:
    """Losses and norms of the plain reference. A weight's moments begin at zero when its turn comes, its step does not.

    That is exact if no weight has two turns.
    """
    weights = draws.initial_weights(case.shape, SEED)
    batches = reference_batches()
    losses, norms = [], []
    how = how_to_train(case)
    adamw = reference.AdamW(weights, clip=how["clip"], **how["optimizer"])
    for turn, only in enumerate(turns):
        for step in range(turn * STEPS, (turn + 1) * STEPS):
            w = {name: value.clone().requires_grad_() for name, value in adamw.weights.items()}
            plan = draws.plan(case.routing, 5, MICRO_BATCHES, seed=SEED, step=step, steps=case.steps)
            each = [reference.loss(w, case.shape, tokens, row) for tokens, row in zip(batches[step], plan, strict=True)]
            loss = torch.stack(each).mean()
            found = torch.autograd.grad(loss, list(w.values()), allow_unused=True, materialize_grads=True)
            gradients = {name: g * is_trained(name, only) for name, g in zip(w, found, strict=True)}
            kept = {name: value.clone() for name, value in adamw.weights.items() if not is_trained(name, only)}
            norms.append(adamw.step(gradients))
            adamw.weights |= kept
            losses.append(loss.item())
    return losses, norms


def reference_batches() -> list[torch.Tensor]:
    from skvr_dist.lab.verify.cases import batches
    from skvr_dist.lab.verify.reshard import STEPS as ALL

    return batches(ALL)


@pytest.mark.parametrize(
    ("layout", "tied"),
    [("PP2", True), ("DP2 ZeRO-2", False), ("DP2 ZeRO-3", True)],
)
def test_parts_in_turns(layout: str, tied: bool, tmp_path: Path) -> None:
    """Keys and values first; then, from that checkpoint, what was frozen before. No weight has two turns."""
    case = Case(layout, "strategy", tied=tied, steps=4)
    turns: list[list[str] | None] = [KEYS_AND_VALUES, ["mlp", "q_norm"]]
    losses, norms = train_reference(case, turns)
    for rank in run_ranks(LAYOUTS[layout].ranks, train_in_turns, case, str(tmp_path), turns):
        assert rank["losses"] == pytest.approx(losses, rel=1e-6)
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        starts, ends = rank["weights"][0::2], rank["weights"][1::2]
        for name, weight in starts[1].items():
            assert torch.equal(weight, ends[0][name]), f"{name} was not loaded as it was saved"
        for only, before, after in zip(turns, starts, ends, strict=True):
            moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
            assert moved == {name for name in before if is_trained(name, only)}
        masters = 3 if LAYOUTS[layout].parallel.get("zero_stage", 1) else 2
        replicas = 2 if "DP2" in layout else 1
        for state, trained in zip(rank["state"], rank["trained"], strict=True):
            assert state <= masters * (trained / replicas) * 1.01 + 64


def test_bf16_keeps_frozen_weights(tmp_path: Path) -> None:
    case = Case("DP2 ZeRO-1", precision="bf16", steps=4)
    turns: list[list[str] | None] = [["v_proj"], None]
    for rank in run_ranks(2, train_in_turns, case, str(tmp_path), turns):
        before, after, resumed, end = rank["weights"]
        assert all(torch.equal(after[name], resumed[name]) for name in after)
        assert {name for name in before if not torch.equal(before[name], after[name])} == {
            name for name in before if "v_proj" in name
        }
        assert sum(not torch.equal(resumed[name], end[name]) for name in end) > len(end) / 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.only=[k_projj]"], r"train\.only names k_projj, but the modules of the model are embed_tokens, "),
        (["train.only=[layers]"], "names layers, but"),
        (["train.only=[lm_head]", "model.tie_word_embeddings=false"], "nothing to train on pipeline stage 0, which"),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_trainable(load_config([QUICKSTART], overrides))
    require_trainable(load_config([QUICKSTART], ["train.only=[k_proj]"]))
