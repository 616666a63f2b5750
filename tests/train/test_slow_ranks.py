"""Ranks and links that make the others wait are named."""

from __future__ import annotations

import time

import pytest

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.lab.verify.cases import SHAPE, Case, batches
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.slow_ranks import RankTimes, RankWatch, slow_links, slow_ranks


def times(host: str, own: float = 0.1, link: float = 0.001, stage: int = 0) -> RankTimes:
    return RankTimes(host, stage, step=1.0, own=own, wait=0.5, link=link)


def test_a_slow_rank_is_compared_with_those_of_its_stage() -> None:
    assert slow_ranks([times("a"), times("b", 0.3), times("c", 0.11)]) == [
        "slow: rank 1 on b takes 0.300 s for its own part of a step, the others 0.100 s and wait"
    ]
    assert slow_ranks([times("a"), times("a"), times("b", 0.3, stage=1), times("b", 0.3, stage=1)]) == []
    assert slow_ranks([times("a"), times("b", 0.3, stage=1)]) != []  # one rank a stage: they should take as long
    assert slow_ranks([times("a", 0.001), times("b", 0.003)]) == []  # nobody would notice
    many = slow_ranks([times("a")] * 7 + [times("b", 0.2 + rank / 100) for rank in range(6)])
    assert many[0].startswith("slow: rank 12 on b takes 0.250 s") and many[0].endswith("; and 2 more")


@pytest.mark.parametrize(
    ("links", "best", "sentence"),
    [
        (
            [0.001, 0.09, 0.08],
            [0.001] * 3,
            "slow: the link of b: 256 KiB from rank 0 on a to rank 1 on b 0.090 s, ",
        ),
        ([0.001, 0.001, 0.08], [0.001] * 3, "slow: a link: 256 KiB from rank 1 on b to rank 2 on c 0.080 s, the best"),
        ([0.09, 0.08, 0.08], [0.001, 0.08, 0.08], "slow: a link: 256 KiB from rank 2 on c to rank 0 on a 0.090 s"),
        ([0.09, 0.08, 0.1], [0.08] * 3, None),
        ([0.0001, 0.0009, 0.0001], [0.0001] * 3, None),
    ],
)
def test_a_slow_link_is_compared_with_the_fastest_and_with_its_past(
    links: list[float], best: list[float], sentence: str | None
) -> None:
    said = slow_links([times(host, link=link) for host, link in zip("abc", links, strict=True)], best)
    assert [text[: len(sentence or "")] for text in said] == ([sentence] if sentence else [])


def test_links_within_a_host_are_not_compared() -> None:
    assert slow_links([times("a", link=0.1), times("a", link=0.001)], [0.001] * 2) == []


def train_with_a_slow_rank() -> tuple[dict[str, float], list[str]]:
    from skvr_dist.train.build import build_engine

    config = Case("DP2 ZeRO-1").config()
    mesh = Mesh.build(ParallelConfig(), ModelConfig.model_validate(SHAPE))
    engine, watch = build_engine(config, mesh), RankWatch(mesh, every_steps=3)
    module = engine.module
    if mesh.rank == 1:
        module.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    for step, batch in enumerate(batches(3)):
        started = time.perf_counter()
        engine.train_step(map(MicroBatch.of, batch[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step))
        watch.add(time.perf_counter() - started, *engine.stopwatch.read())
        values, said = watch.report(step + 1)
        assert bool(values) == (step == 2)
    return values, said


def test_a_rank_that_is_slow_is_named_while_it_trains() -> None:
    (values, said), (same, _) = run_ranks(2, train_with_a_slow_rank)
    assert values == same and {tag.split("/")[1] for tag in values} == {"own_seconds", "wait_seconds", "link_seconds"}
    assert said[0].startswith("slow: rank 1 on ")
