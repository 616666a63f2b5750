"""One pipeline stage as DeepSpeed wants it: a slice of the decoder inside a PipelineModule."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.model.compiled import compile_layers, resolve_compile
from skvr_dist.model.decoder import Decoder, DecoderLayer, initialize
from skvr_dist.model.documents import Documents
from skvr_dist.model.loss import Losses, Objective
from skvr_dist.model.modules import TensorShard, shards_of
from skvr_dist.model.trained import train_only
from skvr_dist.parallel.engine.zero import Partitioner, TiedWeights
from skvr_dist.parallel.mesh import Mesh, new_groups
from skvr_dist.parallel.pipeline.boundary import Handover
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.parallel.tensor import TensorParallelModules
from skvr_dist.routing import KVPart

TIED_WEIGHT = "embed_tokens.weight"
"""The canonical name of the weight that first and last stage share when embeddings are tied."""


class Prediction(NamedTuple):
    """What the last stage makes of a micro-batch."""

    final: Tensor
    """[B, S, D], what the head saw; without a gradient."""
    losses: Losses | None
    """None if there was nothing to predict."""


class StageModule(PipelineModule):
    """Holds this rank's slice of the decoder; overrides how PipelineModule splits, builds and ties layers.

    PipelineModule expects a list of layers that map one value to one value. A routed stage maps hidden states and
    any number of keys and values, chosen per micro-batch by the plan, so the slice is one module here.
    """

    decoder: Decoder
    shards: dict[str, TensorShard]
    """The shard that each parameter of the decoder holds, by canonical name."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        seed: int,
        deepspeed_json: dict[str, Any],
        sequence_length: int,
        only: Collection[str] | None = None,
    ) -> None:
        """Build the slice, with initial weights in the precision of the run; with ZeRO-3 only this rank's part of them.

        Args:
            deepspeed_json: DeepSpeed's configuration.
            sequence_length: of the run's data, by which layers are shared out.
            only: modules whose parameters are trained, by their names; None: all.
        """
        self.model_config = model
        self.sequence_parallel = parallel.sequence_parallel
        self._parallel = parallel
        self._mesh = mesh
        self._bounds = stage_bounds(model, parallel, sequence_length)
        self._seed = seed
        self._deepspeed_json = deepspeed_json
        self._only = only
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds and the topology
            topology = PipeModelDataParallelTopology(num_pp=mesh.pp_size, num_dp=mesh.dp_size, num_mp=mesh.tp_size)
            super().__init__(layers=[], topology=topology)

    @property
    def starts(self) -> list[int]:
        """The first layer of every stage."""
        return [start for start, _ in self._bounds]

    @property
    def start(self) -> int:
        """This stage's first layer."""
        return self._bounds[self._mesh.pp_rank][0]

    @property
    def stop(self) -> int:
        """The first layer after this stage."""
        return self._bounds[self._mesh.pp_rank][1]

    def forward(
        self,
        *,
        inputs: Tensor | Handover,
        donors: Sequence[Sequence[int]],
        leaving: Sequence[KVPart],
        documents: Documents | None,
        objective: Objective | None = None,
    ) -> Handover | Prediction:
        """Run the slice.

        Args:
            inputs: on the first stage tokens, int [B, S]; else what the stage before hands over.
            donors: int [R][L], the donors of this micro-batch: one row for all of its sequences, or one for each.
            leaving: keys and values that go out, received ones among them.
            documents: those that attention stays within, if it does, on the device.
            objective: on the last stage, what is to be predicted; None: nothing.

        Returns:
            on the last stage the losses, on the others what the next stage gets.
        """
        if isinstance(inputs, Handover):
            hidden, received = inputs.hidden, inputs.kv
        else:
            hidden, received = self.decoder.embed(inputs), {}
        if torch.is_grad_enabled():
            # Where the embedding is not trained: with a gradient for their inputs, all layers look alike to autograd,
            # and ZeRO-3 does not take the first one for finished before its weights have their gradients.
            hidden.requires_grad_()
        hidden, known = self.decoder.run_layers(hidden, donors, received, documents=documents)
        if self.decoder.has_head:
            final = self.decoder.final(hidden)
            return Prediction(final.detach(), self.decoder.head(final, objective=objective) if objective else None)
        return Handover(hidden, {part: known[part] for part in leaving})

    def compile_layers(self, device: torch.device) -> None:
        """Compile the layers for a device, as the configuration says."""
        if backend := resolve_compile(self._parallel.compile, device):
            compile_layers(self.decoder, backend, device)

    # What PipelineModule calls while it is built.

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = [*self.starts, self._bounds[-1][1]]
        self._set_bounds(start=self.start, stop=self.stop)

    def _build(self) -> None:
        modules = None
        if self._mesh.tp_size > 1:
            modules = TensorParallelModules(self.model_config, self._mesh, self.sequence_parallel)
        checkpointing = self._parallel.activation_checkpointing
        with torch.device("meta"):  # torch's own initial weights are never drawn
            decoder = Decoder(self.model_config, self.start, self.stop, modules=modules, checkpointing=checkpointing)
        # Weights are drawn in the precision of the run, where they stay: neither all of them in float32 nor whole ones
        # that other replicas hold a part of are ever on the host.
        self.decoder = decoder.to(torch.bfloat16 if self._deepspeed_json["bf16"]["enabled"] else torch.float32)
        train_only(self.decoder, self._only)
        self.shards = shards_of(self.decoder)
        device = torch.device(get_accelerator().device_name(self.local_rank))
        if self._deepspeed_json["zero_optimization"]["stage"] == 3:
            initialize(self.decoder, self._seed, device, Partitioner(self._deepspeed_json, self.mpu()))
        else:
            initialize(self.decoder, self._seed, device)
        for name, parameter in self.decoder.named_parameters():
            _count_in_norm(parameter, self.shards[name].primary)
        # ZeRO-3 fetches and reduces a layer as one: which of its parameters take part depends on the routing, and
        # differs between replicas.
        set_z3_leaf_modules(self, [DecoderLayer], raise_if_not_found=False)

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """The embedding that first and last stage share when embeddings are tied, with the group that sums it."""
        last = len(self._bounds) - 1
        if not self.model_config.tie_word_embeddings or last == 0:
            return {}
        pairs = [[pipe[0], pipe[-1]] for pipe in self._mesh.pipelines()]
        groups = new_groups(pairs)
        if self._mesh.pp_rank not in (0, last):
            return {}
        module, name = self.decoder.embed_tokens, TIED_WEIGHT
        if self._mesh.pp_rank == last:  # the first stage stands for both
            self.shards[name] = dataclasses.replace(self.shards[name], primary=False)
            _count_in_norm(self.decoder.get_parameter(name), False)
        ranks, group = next((ranks, group) for ranks, group in zip(pairs, groups, strict=True) if group is not None)
        return {"embed_tokens": {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": module}}

    def _synchronize_tied_weights(self) -> None:
        """Nothing to send: both stages draw or load the same weights by name."""

    @property
    def tied(self) -> tuple[nn.Parameter, dist.ProcessGroup] | None:
        """The tied embedding and the group of first and last stage, on these; None where the stages share none."""
        return next(((comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()), None)

    def partial_weights(self) -> list[nn.Parameter]:
        """The trained weights whose gradients are yet to be summed over the tensor-parallel ranks."""
        trained = ((name, weight) for name, weight in self.decoder.named_parameters() if weight.requires_grad)
        return [weight for name, weight in trained if self.shards[name].partial]

    def get_tied_weights_and_groups(self) -> TiedWeights:
        """`tied` as DeepSpeed asks for it; nothing if it is not trained."""
        return [self.tied] if self.tied and self.tied[0].requires_grad else []


def _count_in_norm(parameter: nn.Parameter, counted: bool) -> None:
    """Tell DeepSpeed's gradient norms whether to count a parameter on this rank.

    ZeRO-0, ZeRO-1 and ZeRO-2 leave out what is marked as replicated; ZeRO-3 counts what is marked as model-parallel,
    and everything on the first rank of a model-parallel group, where everything is counted anyway.
    """
    setattr(parameter, PIPE_REPLICATED, not counted)
    parameter.model_parallel = counted  # type: ignore[attr-defined]
