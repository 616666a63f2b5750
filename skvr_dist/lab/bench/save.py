"""What an asynchronous save costs the steps beside it, and how fast it is."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from skvr_dist.checkpoint.folder import Checkpoint, step_folder
from skvr_dist.checkpoint.saver import Saver
from skvr_dist.config.load import dump_config
from skvr_dist.config.tree import Config
from skvr_dist.lab.bench.step import Ratio, random_batches
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.optimizers import state_to_save
from skvr_dist.parallel.mesh import Mesh, new_host_group
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.state import load_state, progress_facts


@dataclass(frozen=True)
class SavingCost:
    """What asynchronous saving costs."""

    ratio: Ratio
    """Mean seconds of the steps that a save touches, over those of the step before and the one after, by save."""
    saves: int
    steps_touched: float
    """Steps that run while a save writes; the mean over saves."""
    bytes: int
    """Size of a checkpoint."""
    files: int
    copy_seconds: float
    """Time for which training waits while the state is copied; the median."""
    save_seconds: float
    """Time of a save with no training beside it, from the copy to the published folder."""
    load_seconds: float
    plain_copy_seconds: float
    """Time of a copy of the files by the operating system, synced to the disk as a save is."""


def saving_cost(config: Config, engine: RoutedPipelineEngine, mesh: Mesh, folder: Path, saves: int) -> SavingCost:
    """Start saves, and time the steps that they touch and the ones before and after; collective over all ranks."""
    batches = random_batches(config)
    saver = Saver(
        folder,
        new_host_group(),
        config_text=dump_config(config),
        files={},
        keep_last=1,
        keep_every_steps=None,
        megabytes_per_second=config.checkpoint.megabytes_per_second,
    )
    number = 0

    def step() -> float:
        nonlocal number
        mesh.host_group.sum([0.0])  # all ranks start together
        started = time.perf_counter()
        engine.train_step(batches, plan_of_step(config, number))
        number += 1
        return time.perf_counter() - started

    def save() -> float:
        started = time.perf_counter()
        saver.save(state_to_save(engine), progress_facts(engine, number, tokens_seen=0), lambda _: None)
        return time.perf_counter() - started

    step()
    copies, ratios, touched = [], [], []
    for _ in range(saves):
        before = step()
        copies.append(save())
        beside = [step()]
        while mesh.host_group.sum([float(saver.is_writing)])[0]:
            beside.append(step())
        saver.finish()
        ratios.append(statistics.fmean(beside) / ((before + step()) / 2))
        touched.append(len(beside))
    mesh.host_group.sum([0.0])
    started = time.perf_counter()
    save()
    saver.finish()
    save_seconds = time.perf_counter() - started
    checkpoint = Checkpoint(folder / step_folder(number))
    started = time.perf_counter()
    load_state(engine, checkpoint)
    load_seconds = time.perf_counter() - started
    return SavingCost(
        ratio=Ratio.between(ratios),
        saves=saves,
        steps_touched=statistics.fmean(touched),
        bytes=sum(facts["bytes"] for facts in checkpoint.files.values()),
        files=len(checkpoint.files),
        copy_seconds=statistics.median(copies),
        save_seconds=save_seconds,
        load_seconds=load_seconds,
        plain_copy_seconds=_plain_copy_seconds(checkpoint, mesh.rank),
    )


def _plain_copy_seconds(checkpoint: Checkpoint, rank: int) -> float:
    """Time in which the operating system copies a checkpoint's files, beside the copies of other ranks."""
    started = time.perf_counter()
    for name in checkpoint.files:
        copy = checkpoint.folder.parent / f"copy-{rank}-{name}"
        shutil.copyfile(checkpoint.folder / name, copy)
        with copy.open("rb+") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - started
