"""Where weights, masters and moments live in each of DeepSpeed's optimizers, as pieces of whole tensors.

    ZeRO-0      the parameter is its own master; the moments have its shape
    ZeRO-1, 2   a slice of one flat fp32 tensor per parameter group; also bf16 with ZeRO-1 (BF16_Optimizer)
    ZeRO-3      a slice of a flat fp32 tensor per subgroup, beside the slice of the parameter

A parameter that is not trained has no master and no moments: it is its own, with ZeRO-3 its slice is.

Gradients are in `skvr_dist.parallel.engine.gradients`. In a checkpoint a weight is stored once, in fp32 where a master
exists, and never as the bf16 copy made from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from skvr_dist.checkpoint.pieces import MOMENTS, WEIGHTS, Piece, Pieces, pieces_of
from skvr_dist.model.modules import TensorShard
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.stage import TIED_WEIGHT

_TIED_ELEMENTS = 1 << 24
"""Elements of a tied embedding that are put together at a time: 64 MiB in fp32."""
BYTES_OF_A_TURN = 1 << 28
"""What a replica reads for all before it hands it out; a larger tensor is read alone."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The part of one weight's optimizer state that this rank holds: `count` elements of a flat tensor."""

    name: str
    parameter: nn.Parameter
    shard: TensorShard
    local_shape: tuple[int, ...]
    flat: nn.Parameter | Tensor
    """What the optimizer updates, and its key for the moments."""
    offset: int
    """Where this weight's elements begin in `flat`."""
    count: int
    start: int
    """Index of the first of these elements in the flattened parameter."""

    def master(self) -> Tensor:
        """The weights, flat [count], a view; fp32 unless the parameter is its own master."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.count)

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """Adam's `exp_avg` or `exp_avg_sq` of these elements, flat [count], a view."""
        return optimizer.state[self.flat][key].view(-1).narrow(0, self.offset, self.count)

    def pieces(self, flat: Tensor) -> list[Piece]:
        """The rectangles that a flat tensor of this partition's elements makes."""
        return pieces_of(self.shard, self.local_shape, flat, self.start)


def partitions(engine: RoutedPipelineEngine) -> Iterator[Partition]:
    """This rank's partitions of all its weights; weights of which it holds no element are left out."""
    optimizer, shards = engine.optimizer, engine.stage.shards
    for name, parameter in engine.stage.decoder.named_parameters():
        p: Any = parameter  # with the attributes that DeepSpeed adds
        if hasattr(p, "ds_id"):  # ZeRO-3
            offset, flat = 0, p.ds_tensor
            if p.requires_grad:
                group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
                flat = optimizer.fp32_partitioned_groups_flat[group]
            start = p.ds_tensor.ds_numel * engine.mesh.dp_rank
            count = max(min(p.ds_tensor.ds_numel, p.ds_numel - start), 0)  # the last partition may be padded
            shape = tuple(p.ds_shape)
        elif engine.zero_optimization() and p.requires_grad:  # ZeRO-1 and 2
            mapping = p._hp_mapping
            if mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            # DeepSpeed leaves the flat partition of each group as the group's only parameter.
            (flat,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
            shape = tuple(parameter.shape)
        else:
            start, offset, count, shape, flat = 0, 0, parameter.numel(), tuple(parameter.shape), parameter
        if count:
            yield Partition(name, parameter, shards[name], shape, flat, offset, count, start)


def state_to_save(engine: RoutedPipelineEngine) -> Pieces:
    """The weights, and moments if there are any, that this rank saves: what several ranks hold is saved by one."""
    return _pieces([p for p in partitions(engine) if p.shard.primary], engine.basic_optimizer)


def state_to_load(engine: RoutedPipelineEngine, adam_steps: int) -> Pieces:
    """The memory of all weights and moments that this rank holds, to be filled; moments are zero until then.

    Args:
        adam_steps: optimizer steps that the moments have seen.
    """
    held = list(partitions(engine))
    is_fused = engine.basic_optimizer.defaults.get("fused")
    for flat in {id(p.flat): p.flat for p in held if p.parameter.requires_grad}.values():
        engine.basic_optimizer.state[flat] = {
            # A fused kernel reads and counts it where it runs.
            "step": torch.tensor(float(adam_steps), device=flat.device if is_fused else "cpu"),
            **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
        }
    return _pieces(held, engine.basic_optimizer)


def _pieces(held: list[Partition], optimizer: torch.optim.Optimizer) -> Pieces:
    found: Pieces = {}
    for partition in held:
        found[WEIGHTS + partition.name] = partition.pieces(partition.master())
        if optimizer.state.get(partition.flat):  # there are none before the first step
            for key in MOMENTS:
                found[f"{key}.{partition.name}"] = partition.pieces(partition.moment(optimizer, key))
    return found


def adam_steps(engine: RoutedPipelineEngine) -> int:
    """Steps that the optimizer has taken; fewer than the run's if updates were skipped."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if state), default=0)


Turn = list[tuple[str, nn.Parameter, int]]
"""With ZeRO-3, tensors of the state that are read before any of the next turn: name, weight, and the replica that reads
each for all."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one rank reads of a checkpoint at a time, for itself and for others."""

    pieces: Pieces
    besides: Collection[str] | None = ()
    """Tensors of this rank's further readings; None in these."""
    turn: Turn = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Of the turn, the tensors of whole shards that this rank hands out: flat, padded to equal parts."""


def readings(engine: RoutedPipelineEngine, state: Pieces, is_loaded: Callable[[str], bool]) -> Iterator[Reading]:
    """What this rank reads of a state that it holds, one after the other, equally many on all ranks; collective.

    The rest it gets from other ranks, in `hand_out` after each of them and in `complete_state`. Of what all replicas
    hold, the first one alone reads; of what first and last stage hold, the first one. With ZeRO-3, where each weight is
    cut into as many parts as there are replicas, the replicas take turns to read whole ones: so many at a time that a
    rank's memory holds little beside its own part of the state.

    Args:
        state: of `state_to_load`.
        is_loaded: whether a tensor of that name is to be loaded; the same on all ranks.
    """
    if engine.zero_optimization_partition_weights():
        turns = _turns(_handed_out(engine, is_loaded))
    else:
        left = {name for name in state if not is_loaded(name) or _is_tied_copy(engine, name)}
        if engine.mesh.dp_rank != 0:
            left |= _held_by_all_replicas(engine, state).keys()
        yield Reading({name: pieces for name, pieces in state.items() if name not in left})
        return
    further: list[str] | None = [
        name for turn in turns[1:] for name, _, reader in turn if reader == engine.mesh.dp_rank
    ]
    for number in range(max(engine.mesh.host_group.gather(len(turns)))):
        yield _whole_shards(engine, turns[number] if number < len(turns) else [], further)
        further = None


def _turns(tensors: Iterable[tuple[str, nn.Parameter, int]]) -> list[Turn]:
    """Tensors in turns, in each of which no replica reads much more than `BYTES_OF_A_TURN`; at least one turn."""
    turns: list[Turn] = [[]]
    read: dict[int, int] = defaultdict(int)
    for name, parameter, reader in tensors:
        size = parameter.ds_numel * torch.float32.itemsize  # type: ignore[attr-defined]
        if read[reader] and read[reader] + size > BYTES_OF_A_TURN:
            turns.append([])
            read.clear()
        turns[-1].append((name, parameter, reader))
        read[reader] += size
    return turns


def _whole_shards(engine: RoutedPipelineEngine, turn: Turn, besides: Collection[str] | None) -> Reading:
    shards, replicas = engine.stage.shards, engine.mesh.dp_size
    reading = Reading({}, besides, turn)
    for name, parameter, reader in turn:
        if reader == engine.mesh.dp_rank:
            ds_tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            dtype = torch.float32 if parameter.requires_grad else ds_tensor.dtype
            flat = torch.zeros(ds_tensor.ds_numel * replicas, dtype=dtype)
            shard, count = shards[name.partition(".")[2]], parameter.ds_numel  # type: ignore[attr-defined]
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            reading.pieces[name] = pieces_of(shard, shape, flat[:count])
            reading.whole[name] = flat
    return reading


def _handed_out(
    engine: RoutedPipelineEngine, is_loaded: Callable[[str], bool]
) -> Iterator[tuple[str, nn.Parameter, int]]:
    """With ZeRO-3, the tensors of the state that a replica reads for all, in one order on all, and which one does."""
    number = 0
    for weight, parameter in engine.stage.decoder.named_parameters():
        for kind in (WEIGHTS.rstrip("."), *(MOMENTS if parameter.requires_grad else ())):
            name = f"{kind}.{weight}"
            if is_loaded(name) and not _is_tied_copy(engine, name):
                yield name, parameter, number % engine.mesh.dp_size
                number += 1


def _is_tied_copy(engine: RoutedPipelineEngine, name: str) -> bool:
    """Whether a tensor of the state is of the embedding that the first stage holds, too."""
    return engine.mesh.pp_rank > 0 and engine.stage.tied is not None and name.partition(".")[2] == TIED_WEIGHT


def _held_by_all_replicas(engine: RoutedPipelineEngine, state: Pieces) -> Pieces:
    """All with ZeRO-0, nothing with ZeRO-3; with ZeRO-1 and 2 the parameters that are not trained."""
    if not engine.zero_optimization():
        return state
    if engine.zero_optimization_partition_weights():
        return {}
    parameters = engine.stage.decoder.named_parameters()
    frozen = {WEIGHTS + name for name, parameter in parameters if not parameter.requires_grad}
    return {name: pieces for name, pieces in state.items() if name in frozen}


@torch.no_grad()
def complete_state(engine: RoutedPipelineEngine, state: Pieces, is_loaded: Callable[[str], bool]) -> None:
    """Set all parameters, after all `readings`; collective.

    No rank reads what another one has read: each replica gets the others' parts of the weights from them, as after an
    optimizer step.

    Args:
        state, is_loaded: as for `readings`.
    """
    optimizer, of_all = engine.optimizer, _held_by_all_replicas(engine, state)
    if engine.mesh.dp_size > 1:
        for name, pieces in of_all.items():
            for piece in pieces if is_loaded(name) and not _is_tied_copy(engine, name) else ():
                dist.broadcast(piece.tensor.detach(), group=engine.mesh.devices.get_group("dp"), group_src=0)
    _copy_tied_state(engine, is_loaded, is_shared_out=not of_all.keys() & {WEIGHTS + TIED_WEIGHT})
    if engine.zero_optimization_partition_weights():
        for partition in partitions(engine):
            stored = partition.parameter.ds_tensor  # type: ignore[attr-defined]
            stored.data.view(-1)[: partition.count].copy_(partition.master())
        if optimizer.persistent_parameters:  # small ones, which every rank keeps whole
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif engine.zero_optimization():
        optimizer.update_lp_params()
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # fragments of the moments that were just made
            optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def hand_out(engine: RoutedPipelineEngine, reading: Reading) -> None:
    """Give each replica its parts of what the replicas have read for all, once it was read; collective over them."""
    held = {partition.name: partition for partition in partitions(engine)} if reading.turn else {}
    for name, parameter, reader in reading.turn:
        whole = reading.whole.pop(name, None)
        kind, _, weight = name.partition(".")
        ds_tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        dtype = torch.float32 if parameter.requires_grad else ds_tensor.dtype
        mine = torch.empty(ds_tensor.ds_numel, dtype=dtype, device=engine.device)
        parts = None if whole is None else list(whole.to(engine.device).split(ds_tensor.ds_numel))
        reading.pieces.pop(name, None)
        dist.scatter(mine, parts, group=engine.mesh.devices.get_group("dp"), group_src=reader)
        if weight in held:  # the last parts of a small weight are padding
            _held(engine, held[weight], kind).copy_(mine[: held[weight].count])


def _held(engine: RoutedPipelineEngine, partition: Partition, kind: str) -> Tensor:
    """A partition's master weights or moments, flat."""
    return partition.moment(engine.basic_optimizer, kind) if kind in MOMENTS else partition.master()


def _copy_tied_state(engine: RoutedPipelineEngine, is_loaded: Callable[[str], bool], *, is_shared_out: bool) -> None:
    """Give the last stage the first one's master and moments of the tied embedding; collective over both.

    The replicas of the two stages may hold different parts of it. So those of the first stage put it together, some
    elements at a time, each hands them to its partner, and the replicas of the last stage take their own.

    Args:
        is_shared_out: whether a replica holds a part only.
    """
    if engine.stage.tied is None:
        return
    weight, pair = engine.stage.tied
    kinds = [WEIGHTS.rstrip("."), *(MOMENTS if weight.requires_grad else ())]
    partition = next((p for p in partitions(engine) if p.name == TIED_WEIGHT), None)
    length, is_first = getattr(weight, "ds_numel", weight.numel()), engine.mesh.pp_rank == 0
    dtype = torch.float32 if engine.zero_optimization() and weight.requires_grad else weight.dtype
    for kind in kinds:
        if not is_loaded(f"{kind}.{TIED_WEIGHT}"):
            continue
        held, start = torch.empty(0, dtype=dtype), 0
        if partition is not None:
            start = partition.start
            held = _held(engine, partition, kind)
        for begin in range(0, length, _TIED_ELEMENTS):
            count = min(_TIED_ELEMENTS, length - begin)
            sent = torch.zeros(count, dtype=held.dtype, device=engine.device)
            first, last = max(start, begin), min(start + len(held), begin + count)
            here, there = slice(first - begin, last - begin), slice(first - start, last - start)
            if is_first and first < last:
                sent[here] = held[there].to(sent.device)
            if is_first and is_shared_out and engine.mesh.dp_size > 1:
                # As bytes, of which all but one replica's are zero: the sum is exact.
                dist.all_reduce(sent.view(torch.uint8), group=engine.mesh.devices.get_group("dp"))
            dist.broadcast(sent, group=pair, group_src=0)
            if not is_first and first < last:
                held[there] = sent[here].to(held.device)


def gather_parameter(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a weight, on the host, whatever ZeRO stage holds it; collective over the replicas."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu().clone()
    with GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def gather_master(parameter: nn.Parameter) -> Tensor:
    """The fp32 master of this rank's shard of a weight, with ZeRO or in bf16; collective over the replicas."""
    return safe_get_full_fp32_param(parameter)


def parameter_tensors(engine: RoutedPipelineEngine) -> list[Tensor]:
    """What this rank holds of the parameters: with ZeRO-3 its partitions."""
    return [getattr(p, "ds_tensor", p) for p in engine.stage.decoder.parameters()]


def optimizer_tensors(engine: RoutedPipelineEngine) -> list[Tensor]:
    """The moments that this rank holds, and the master weights where they are not the parameters themselves."""
    own = {p.data_ptr() for p in engine.stage.parameters()}
    optimizer = engine.basic_optimizer
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
    masters = [p for p in (*groups, *flat) if p.data_ptr() not in own]
    moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim() > 0]
    return [*masters, *moments]
