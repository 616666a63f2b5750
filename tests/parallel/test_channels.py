"""What travels between stages: channels under NCCL's rule of first use, and sends before receives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from skvr_dist.data.batch import MicroBatch
from skvr_dist.lab.verify.cases import LAYOUTS, Case, batches
from skvr_dist.lab.verify.first_use import NeverMet, first_use_blocks
from skvr_dist.lab.verify.measure import run_case
from skvr_dist.lab.verify.ranks import RankError, run_ranks
from skvr_dist.parallel.engine import engine as engine_module
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.schedule import sends_first
from skvr_dist.parallel.mesh import Mesh, new_groups
from skvr_dist.parallel.pipeline.channel import Channel
from skvr_dist.train.plans import plan_of_step

PIPELINES = ["PP2", "PP4 uneven", "PP2xDP2 ZeRO-1"]


class Rank:
    """This rank's engine for a case, with the batches and plans of its steps."""

    def __init__(self, case: Case) -> None:
        from skvr_dist.train.build import build_engine

        self.config = case.config()
        self.mesh = Mesh.build(self.config.parallel, self.config.model)
        self.engine = build_engine(self.config, self.mesh)
        self.batches = [
            [MicroBatch.of(each) for each in batch[self.mesh.dp_rank :: self.mesh.dp_size]]
            for batch in batches(case.steps)
        ]

    def train(self, step: int) -> float:
        return self.engine.train_step(iter(self.batches[step]), plan_of_step(self.config, step))

    def evaluate(self) -> float:
        return self.engine.evaluate(self.batches[0], [0, 0, 2, 2, 2])


# The rule itself, on two ranks that come to two groups in opposite orders, which gloo allows.

Use = Callable[[dist.ProcessGroup], dist.Work | None]


def sum_up(group: dist.ProcessGroup) -> dist.Work | None:
    return dist.all_reduce(torch.ones(1), group=group, async_op=True)


def receive(group: dist.ProcessGroup) -> dist.Work | None:
    return dist.irecv(torch.ones(1), 1 - dist.get_rank(), group=group)


def send(group: dist.ProcessGroup) -> dist.Work | None:
    return dist.isend(torch.ones(1), 1 - dist.get_rank(), group=group)


def in_opposite_orders(one: Use, other: Use, ruled: bool) -> str:
    groups = [group for group in new_groups([[0, 1], [0, 1]]) if group is not None]
    first, second = groups if dist.get_rank() == 0 else reversed(groups)
    try:
        with first_use_blocks(seconds=2.0) if ruled else contextlib.nullcontext():
            works = [one(first), other(second)]
    except NeverMet as error:
        return str(error)
    for work in works:
        assert work is not None
        work.wait()
    return "met"


@pytest.mark.parametrize(("one", "other"), [(sum_up, sum_up), (receive, send)])
def test_a_first_use_in_another_order_is_noticed(one: Use, other: Use) -> None:
    assert run_ranks(2, in_opposite_orders, one, other, False) == ["met", "met"]
    for rank, message in enumerate(run_ranks(2, in_opposite_orders, one, other, True)):
        assert message.startswith(f"rank {rank} waits at its first ")
        assert message.endswith(f"rank {1 - rank} did not come within 2 s")


# The engine under it. The whole quick matrix runs under it in `test_parity`.


def evaluate_and_train(case: Case) -> tuple[set[str], list[float]]:
    """What two ranks used for the first time after the engine was made, and the losses."""
    with first_use_blocks() as uses:
        rank = Rank(case)
        used = set(uses.met)
        losses = [rank.evaluate(), rank.train(0), rank.train(1), rank.evaluate()]
        return {how for _, how in uses.met - used}, losses


@pytest.mark.parametrize(("layout", "precision"), [("PP4 uneven", "fp32"), ("PP2xDP2 ZeRO-1", "bf16")])
def test_every_channel_has_been_used_before_the_first_step(layout: str, precision: str) -> None:
    """The first step may be an evaluation, as in a run that resumes."""
    (_, expected), *_ = run_ranks(1, evaluate_and_train, Case("single", tied=True))
    case = Case(layout, tied=True, precision=precision)
    for first_used, losses in run_ranks(LAYOUTS[layout].ranks, evaluate_and_train, case):
        assert first_used <= {"collectives"}
        assert losses == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-3)


def train_with_channels_that_were_never_used(layout: str) -> float:
    """As if receives were posted as soon as they are known, over groups that are not connected yet."""
    expect = Channel.expect

    def expect_and_post(channel: Channel, sizes: list[int], ahead: bool = True) -> None:
        expect(channel, sizes, ahead)
        channel._posted = channel._post()

    Channel._connect = lambda self: None  # type: ignore[method-assign]
    Channel.expect = expect_and_post  # type: ignore[assignment, method-assign]
    rank = Rank(Case(layout))
    with first_use_blocks(seconds=2.0):
        return rank.train(0)


@pytest.mark.parametrize("layout", PIPELINES)
def test_a_step_that_would_hang_on_gpus_is_noticed(layout: str) -> None:
    with pytest.raises(RankError, match=r"NeverMet: rank \d waits at its first receive among ranks"):
        run_ranks(LAYOUTS[layout].ranks, train_with_channels_that_were_never_used, layout)


def train_while_one_rank_is_held() -> list[float]:
    """On each rank in turn, a receive holds the host from when it is posted until its tensor has come."""
    rank = Rank(Case("PP4 uneven", steps=2))
    post = Channel._post
    held = 0

    def post_and_hold(self: Channel) -> Any:
        posted = post(self)
        if posted is None or rank.mesh.rank != held:
            return posted
        work, tensor = posted
        work.wait()
        return SimpleNamespace(wait=lambda: None), tensor

    Channel._post = post_and_hold  # type: ignore[method-assign]
    losses = []
    for held in range(rank.mesh.world_size):  # noqa: B007
        losses += [rank.train(0), rank.evaluate()]
    return losses


def test_a_posted_receive_does_not_wait_for_its_own_stage() -> None:
    """On GPUs a posted receive may hold up the host, at any call that synchronises the device."""
    losses, *_ = run_ranks(4, train_while_one_rank_is_held, seconds=40.0)
    trained, evaluated = losses[0::2], losses[1::2]
    assert len(trained) == len(evaluated) == 4
    assert trained == sorted(trained, reverse=True) and evaluated == sorted(evaluated, reverse=True)


# The order of instructions.

SENDS = (schedule.SendActivation, schedule.SendGrad)


@pytest.mark.parametrize("kind", [schedule.TrainSchedule, schedule.InferenceSchedule])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 12])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_each_step_sends_first_and_changes_nothing_else(kind: type, micro_batches: int, stages: int) -> None:
    for stage in range(stages):
        steps = [list(map(str, step)) for step in kind(micro_batches, stages, stage)]
        ordered = list(sends_first(kind(micro_batches, stages, stage)))
        for step, before in zip(ordered, steps, strict=True):
            first = [isinstance(instruction, SENDS) for instruction in step]
            assert first == sorted(first, reverse=True)
            assert sorted(map(str, step)) == sorted(before)
            others = [name for name in before if not name.startswith("Send")]
            assert [str(i) for i in step if not isinstance(i, SENDS)] == others


@pytest.mark.parametrize("order", [sends_first, iter])
@pytest.mark.parametrize("kind", [schedule.TrainSchedule, schedule.InferenceSchedule])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 12])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_instruction_is_for_the_micro_batch_in_its_buffer(
    order: Callable[..., Any], kind: type, micro_batches: int, stages: int
) -> None:
    """Instructions of one kind come in the order of the micro-batches, so counting them gives the same numbers."""
    for stage in range(stages):
        steps = kind(micro_batches, stages, stage)
        numbers = [None] * steps.num_pipe_buffers()
        engine: Any = SimpleNamespace(
            pipe_buffers={"micro_batch": numbers}, _arrived=0, is_first_stage=lambda stage=stage: stage == 0
        )
        found: dict[str, list[int | None]] = {}
        for step in order(steps):
            for instruction in step:
                number = RoutedPipelineEngine._pass_of(engine, instruction)
                found.setdefault(instruction.name, []).append(number)
        for name, numbered in found.items():
            whole_step = name in ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
            unnamed = whole_step or (name == "LoadMicroBatch" and stage > 0)
            assert numbered == ([None] * len(numbered) if unnamed else list(range(micro_batches))), name


def steps_by_instruction() -> list[str]:
    """The kinds of instructions that one training step runs here, in order."""
    rank = Rank(Case("PP4 uneven"))
    names: list[str] = []

    def noted(kind: type, run: Callable[..., None]) -> Callable[..., None]:
        def note_and_run(engine: RoutedPipelineEngine, **kwargs: Any) -> None:
            names.append(kind.__name__)
            run(engine, **kwargs)

        return note_and_run

    map_of = RoutedPipelineEngine._INSTRUCTION_MAP
    RoutedPipelineEngine._INSTRUCTION_MAP = {kind: noted(kind, run) for kind, run in map_of.items()}
    rank.train(0)
    return names


def test_nothing_comes_between_a_pass_and_its_send() -> None:
    stages = run_ranks(4, steps_by_instruction)
    for stage, names in enumerate(stages):
        after = {"ForwardPass": "SendActivation", "BackwardPass": "SendGrad"}
        if stage == 0:
            del after["BackwardPass"]
        if stage == 3:
            del after["ForwardPass"]
        followers = [(name, names[at + 1]) for at, name in enumerate(names) if name in after]
        assert len(followers) == 4 * len(after)
        assert all(after[name] == following for name, following in followers)


def train_in_both_orders(layout: str) -> list[dict[str, Tensor]]:
    """Gradients, weights, losses and norms: sends first, and in DeepSpeed's order."""
    results = []
    for order in (sends_first, iter):
        engine_module.sends_first = order  # type: ignore[assignment]
        result = run_case(Case(layout, tied=True))
        held = {f"weights.{name}": tensor for name, (_, tensor) in result.weights.items()}
        for step, gradients in enumerate(result.gradients):
            held |= {f"gradients.{step}.{name}": tensor for name, (_, tensor) in gradients.items()}
        results.append({**held, "losses": torch.tensor(result.losses), "norms": torch.tensor(result.norms)})
    return results


@pytest.mark.parametrize("layout", PIPELINES)
def test_the_order_of_sends_changes_no_bit(layout: str) -> None:
    for ours, deepspeeds in run_ranks(LAYOUTS[layout].ranks, train_in_both_orders, layout):
        assert ours.keys() == deepspeeds.keys() and len(ours) > 10
        for name, tensor in ours.items():
            assert torch.equal(tensor, deepspeeds[name]), name
