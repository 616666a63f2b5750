"""A frozen model that another one learns from, laid out over the same stages and tensor-parallel ranks.

Its weights are held whole by every replica, in the precision of the run, and are no parameters of the engine: neither
optimizer nor ZeRO nor checkpoints know them. It runs at full retention, so that only hidden states cross its
boundaries.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from skvr_dist.checkpoint.brought import tokenizer_of_other_texts
from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.checkpoint.pieces import WEIGHTS, pieces_of
from skvr_dist.config.layouts import require_possible
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.config.tree import Config
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.model.attention_choice import resolve, resolve_beside
from skvr_dist.model.decoder import Decoder
from skvr_dist.model.documents import Documents
from skvr_dist.model.modules import shards_of
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.boundary import Handover
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.parallel.tensor import TensorParallelModules


def open_teacher(config: Config) -> Checkpoint | None:
    """The checkpoint of a run's frozen teacher, as far as one process can tell that it fits; None if there is none.

    Raises:
        UserError: it cannot be read, has another vocabulary or cannot be laid out as the run is.
    """
    if config.distillation is None or config.distillation.is_own:
        return None
    checkpoint = Checkpoint(config.distillation.teacher)
    model, sequence = checkpoint.model_config, config.data.sequence_length
    where = f"distillation.teacher {checkpoint.folder}"
    if model.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {model.vocab_size} tokens, the model one of {config.model.vocab_size}; give "
            f"a teacher with the model's own tokenizer"
        )
    if model.max_position_embeddings < sequence:
        raise UserError(
            f"{where} is made for {model.max_position_embeddings} positions, but data.sequence_length is {sequence}; "
            f"lower it, or give another teacher"
        )
    try:
        require_possible(_layout(config, model), model, sequence, config.train.precision)
    except ValueError as error:
        raise UserError(f"{where} cannot be laid out as the model is: {error}") from None
    return checkpoint


def require_teachers_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse a frozen teacher, where there is one, to which the ids of the data mean other texts.

    Args:
        tokenizer: that of the data.

    Raises:
        UserError: it is one.
    """
    teacher = open_teacher(config)
    if teacher and (theirs := tokenizer_of_other_texts(teacher, tokenizer)):
        raise UserError(
            f"distillation.teacher {teacher.folder} has tokenizer {theirs.sha256[:12]}, to which tokens of "
            f"data.tokenizer {config.data.tokenizer} ({tokenizer.sha256[:12]}) are other texts; give a teacher with "
            f"the model's own tokenizer"
        )


def _layout(config: Config, model: ModelConfig) -> ParallelConfig:
    """The run's layout, with the teacher's layers balanced over the stages if there are not as many as the model's."""
    if model.num_hidden_layers == config.model.num_hidden_layers:
        return config.parallel
    return config.parallel.model_copy(update={"stage_layers": None})


class FrozenTeacher:
    """This rank's slice of a teacher; collective over all ranks, which read its weights.

    Args:
        checkpoint: from `open_teacher`.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, mesh: Mesh) -> None:
        device = torch.device(get_accelerator().current_device_name())
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        own = resolve(config.model.attention, device, dtype, config.model.head_dim)
        attention = resolve_beside(own, device, dtype, checkpoint.model_config.head_dim).name
        self.model_config = checkpoint.model_config.model_copy(update={"attention": attention})
        parallel = _layout(config, self.model_config)
        modules = None
        if mesh.tp_size > 1:
            modules = TensorParallelModules(self.model_config, mesh, parallel.sequence_parallel)
        start, stop = stage_bounds(self.model_config, parallel, config.data.sequence_length)[mesh.pp_rank]
        with torch.device("meta"):
            decoder = Decoder(self.model_config, start, stop, modules=modules)
        decoder = decoder.to_empty(device="cpu").requires_grad_(False)
        shards, pieces = shards_of(decoder), {}
        for name, parameter in decoder.named_parameters():
            parameter.zero_()  # what pads a shard
            pieces[WEIGHTS + name] = pieces_of(shards[name], tuple(parameter.shape), parameter.detach().view(-1))
        checkpoint.read(pieces if mesh.dp_rank == 0 else {}, mesh.host_group, mesh.tp_group_on_host)
        self._decoder = decoder.to(device, dtype).eval()
        if mesh.dp_size > 1:  # the other replicas get what the first one has read
            for parameter in self._decoder.parameters():
                dist.broadcast(parameter.detach(), group=mesh.devices.get_group("dp"), group_src=0)

    @torch.no_grad()
    def run(self, inputs: Tensor | Handover, documents: Documents | None) -> Tensor | Handover:
        """Run the slice at full retention.

        Args:
            inputs: on the first stage tokens, int [B, S]; else what the stage before hands over.
            documents: those that attention stays within, if it does, on the device.

        Returns:
            on the last stage what the head sees, [B, S, D]; on the others what the next stage gets.
        """
        hidden = inputs.hidden if isinstance(inputs, Handover) else self._decoder.embed(inputs)
        donors = range(self.model_config.num_hidden_layers)
        hidden, _ = self._decoder.run_layers(hidden, [donors], {}, documents=documents)
        return self._decoder.final(hidden) if self._decoder.has_head else Handover(hidden, {})

    @property
    def head(self) -> Tensor:
        """This rank's rows of the output head, on the last stage."""
        return self._decoder.head.get_parameter("weight")
