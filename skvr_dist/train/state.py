"""The state of a training: what a checkpoint keeps of it, and how it gets back into an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skvr_dist.checkpoint.facts import Facts, GuardFacts
from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.checkpoint.pieces import MOMENTS, WEIGHTS, Pieces
from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.model.trained import is_trained
from skvr_dist.parallel.engine import optimizers
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.optimizers import complete_state, hand_out, readings, state_to_load
from skvr_dist.train.optimizer import set_step

_WEIGHTS_DEPEND_ON = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_norm",
    "attention_bias",
    "attention_output_bias",
    "tie_word_embeddings",
)


def require_weights_fit(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Check that initial weights fit the decoder that is to start from them.

    The attention kernel, positions and the norms' epsilon may change: they have no weights.

    Raises:
        UserError: they are of another shape.
    """
    for key in _WEIGHTS_DEPEND_ON:
        stored, asked = getattr(checkpoint.model_config, key), getattr(model, key)
        if stored != asked:
            raise UserError(
                f"initial weights {checkpoint.folder} have model.{key} {stored}, the configuration {asked}; give the "
                f"checkpoint's own value or other weights"
            )


def progress_facts(engine: RoutedPipelineEngine, step: int, *, tokens_seen: int, **more: Any) -> Facts:
    """The facts for checkpoint.json: those that `load_state` needs, and `more` of the run."""
    guard = GuardFacts.model_validate(engine.guard.state())
    return Facts(step=step, adam_steps=optimizers.adam_steps(engine), guard=guard, tokens_seen=tokens_seen, **more)


def load_state(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Load weights, moments and the place in the schedule from a checkpoint of any layout; collective.

    Raises:
        UserError: on all ranks: it is of another architecture, or damaged.
    """
    adam_steps, guard = checkpoint.facts.adam_steps, checkpoint.facts.guard
    if adam_steps is None or guard is None:
        raise UserError(f"checkpoint {checkpoint.folder} does not say how far its optimizer was; use another")
    state = state_to_load(engine, adam_steps)
    _load(engine, checkpoint, state, lambda name: not _begins_anew(name, checkpoint))
    engine.global_steps = checkpoint.step
    engine.guard.load_state(guard.model_dump())
    set_step(engine.lr_scheduler, checkpoint.step)


def _begins_anew(name: str, checkpoint: Checkpoint) -> bool:
    """Whether something is a moment of a weight that was not updated before the checkpoint, and so begins at zero."""
    kind, _, weight = name.partition(".")
    if kind not in MOMENTS:
        return False
    return checkpoint.facts.adam_steps == 0 or not is_trained(weight, checkpoint.config.train.only)


def load_weights(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Load the weights alone, to start a new run; collective.

    Raises:
        UserError: on all ranks: they are of another architecture, or the checkpoint is damaged.
    """
    require_weights_fit(checkpoint, engine.stage.model_config)
    _load(engine, checkpoint, state_to_load(engine, adam_steps=0), lambda name: name.startswith(WEIGHTS))


def _load(
    engine: RoutedPipelineEngine, checkpoint: Checkpoint, state: Pieces, is_wanted: Callable[[str], bool]
) -> None:
    """Fill those tensors of a state that are wanted by name; collective."""
    for reading in readings(engine, state, is_wanted):
        checkpoint.read(reading.pieces, engine.mesh.host_group, engine.mesh.tp_group_on_host, besides=reading.besides)
        hand_out(engine, reading)
    complete_state(engine, state, is_wanted)
