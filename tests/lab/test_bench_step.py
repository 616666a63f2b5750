"""Steps timed beside a plain loop of transformers and DeepSpeed: whether both train the same model, not how fast."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from skvr_dist.command import parse
from skvr_dist.commands.bench import step as command
from skvr_dist.config.load import load_config
from skvr_dist.config.presets import find_configs
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.ranks import run_ranks

SMALL = [
    "model.num_hidden_layers=2",
    "data.sequence_length=32",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
]


def timed_and_compared(words: list[str]) -> tuple[int, int, int]:
    """The exit code of the command; and the parameters of the plain loop's model and of ours."""
    from skvr_dist.lab.bench.plain_loop import PlainLoop
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    parser = ArgumentParser()
    command.add_arguments(parser)
    code = command.run(parse(parser, words))
    config = load_config(find_configs(["bench"]), SMALL)
    mesh = Mesh.build(config.parallel, config.model)
    plain = PlainLoop(config, mesh)._engine.module
    ours = build_engine(config, mesh).module
    return code, *(sum(each.numel() for each in module.parameters()) for module in (plain, ours))


def test_a_plain_loop_beside_ours(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    words = ["--against", "hf", "--rounds", "2", "--bound", "100", "--against-bound", "0", "--json", str(file), *SMALL]
    ((code, plain, ours),) = run_ranks(1, timed_and_compared, words)
    assert code == 0 and plain == ours
    seconds = json.loads(file.read_text())["seconds"]
    assert {name: len(each) for name, each in seconds.items()} == {
        "standard": 2,
        "routed": 2,
        "transformers + DeepSpeed": 2,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "hf", "parallel.pipeline=2"], r"parallel\.pipeline is 2 and parallel\.tensor 1; set both to 1"),
        (
            ["--against", "hf", "parallel.activation_checkpointing.recompute=layer"],
            r"recomputes nothing, but parallel\.activation_checkpointing\.recompute is layer; set it to none",
        ),
        (["--against", "hf", "train.only=[norm]"], r"trains all weights on joined documents; leave train\.only out"),
        (["train.only=[nonsense]"], "train.only names nonsense, but the modules of the model are"),
        (["deepspeed.foo=1"], "unknown key deepspeed.foo"),
    ],
)
def test_what_a_run_would_refuse_and_a_plain_loop_cannot_do(words: list[str], message: str) -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        command.run(parse(parser, words))
    assert not torch.distributed.is_initialized()


def with_documents(words: list[str]) -> tuple[int, str]:
    parser = ArgumentParser()
    command.add_arguments(parser)
    try:
        command.run(parse(parser, ["--least-mfu", "0.5", *words]))
    except UserError as error:
        return command.run(parse(parser, words)), str(error)
    return -1, ""


def test_separate_documents_are_timed_and_mfu_is_for_gpus() -> None:
    ((code, refused),) = run_ranks(
        1, with_documents, ["--rounds", "2", "--bound", "100", "data.documents=separate", *SMALL]
    )
    assert code == 0 and refused == "--least-mfu needs bf16 on GPUs whose peak is known (docs/metrics.md); leave it out"
