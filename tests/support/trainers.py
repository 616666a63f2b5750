"""Trainings that tests start on ranks."""

from __future__ import annotations

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.lab.verify.cases import Case
from skvr_dist.lab.verify.reshard import Trainer
from skvr_dist.train.state import load_weights


def start_from_weights(case: Case, path: str) -> list[float]:
    trainer = Trainer(case, path + "-new")
    load_weights(trainer.engine, Checkpoint(path))
    return trainer.train(range(2))
