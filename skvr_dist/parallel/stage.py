"""One pipeline stage as DeepSpeed wants it: a slice of the decoder inside a PipelineModule."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn

from skvr_dist.checkpoint.weights import WeightFiles, save_weights
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder, initialize, next_token_loss
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.partition import Bounds


class StageModule(PipelineModule):
    """Holds this rank's slice of the decoder; overrides how PipelineModule splits, builds, ties and stores layers.

    PipelineModule expects a list of layers that map one value to one value. A routed stage maps hidden states and
    any number of keys and values, chosen per micro-batch by the plan, so the slice is one module here.
    """

    decoder: Decoder

    def __init__(self, model: ModelConfig, bounds: Sequence[Bounds], mesh: Mesh, seed: int) -> None:
        self._model_config = model
        self._bounds = list(bounds)
        self._stage = mesh.stage
        self._seed = seed
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds and the topology
            super().__init__(layers=[], topology=mesh.topology)

    @property
    def start(self) -> int:
        """This stage's first layer."""
        return self._bounds[self._stage][0]

    @property
    def stop(self) -> int:
        """The first layer after this stage."""
        return self._bounds[self._stage][1]

    def forward(
        self,
        inputs: Sequence[Tensor],
        donors: Sequence[int],
        crossing: Sequence[int],
        leaving: Sequence[int],
        labels: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, ...] | Tensor:
        """Run the slice.

        Args:
            inputs: on the first stage [tokens]; else hidden states and the keys and values of `crossing`, in order.
            donors: int [L], the donors of this micro-batch.
            crossing: layers whose keys and values come in.
            leaving: layers whose keys and values go out, received ones among them.
            labels: int [B, S], on the last stage.
            documents: int [B, S], if attention stays within documents.

        Returns:
            on the last stage the mean cross entropy; else hidden states [B, S, D], then keys and values of `leaving`,
            in order.
        """
        head, *kv = inputs
        hidden = self.decoder.embed(head) if self.decoder.has_embedding else head
        received = dict(zip(crossing, zip(kv[0::2], kv[1::2], strict=True), strict=True))
        hidden, known = self.decoder.run_layers(hidden, donors, received, documents=documents)
        if labels is not None:
            return next_token_loss(self.decoder.logits(hidden), labels)
        return (hidden, *(tensor for layer in leaving for tensor in known[layer]))

    # What PipelineModule calls while it is built.

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = [start for start, _ in self._bounds] + [self._bounds[-1][1]]
        self._set_bounds(start=self.start, stop=self.stop)

    def _build(self) -> None:
        with torch.device("meta"):  # torch's own initial weights are never drawn
            decoder = Decoder(self._model_config, self.start, self.stop)
        self.decoder = decoder.to_empty(device="cpu")
        initialize(self.decoder, self._seed)
        for parameter in self.parameters():
            # Read by DeepSpeed's gradient norms: a replicated parameter is counted on one stage only.
            setattr(parameter, PIPE_REPLICATED, False)

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """The embedding that first and last stage share when embeddings are tied, with the group that sums it."""
        stages = len(self._bounds)
        if not self._model_config.tie_word_embeddings or stages == 1:
            return {}
        tied: dict[str, dict[str, Any]] = {}
        for replica in range(self._topo.get_dim("data")):
            ranks = [self._topo.get_rank(pipe=stage, data=replica) for stage in (0, stages - 1)]
            group = dist.new_group(ranks)  # every rank creates every group, in the same order
            if self.global_rank in ranks:
                module = self.decoder.embed_tokens
                setattr(module.weight, PIPE_REPLICATED, self.global_rank != ranks[0])
                tied["embed_tokens"] = {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": module}
        return tied

    def _synchronize_tied_weights(self) -> None:
        """Nothing to send: both stages draw or load the same weights by name."""

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        return [(comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()]

    # What DeepSpeed's save_checkpoint and load_checkpoint call: weights go to safetensors under canonical names,
    # which any number of stages, or one process without any, can read.

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        if self._grid.data_parallel_id == 0:
            save_weights(Path(save_dir), self.decoder, part=self._stage, parts=len(self._bounds))

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        WeightFiles(Path(load_dir)).copy_into(self.decoder)
