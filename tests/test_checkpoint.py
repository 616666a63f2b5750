"""Checkpoints: exact resume in each precision, what is refused, and what an interruption cannot leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from skvr_dist.checkpoint.folder import Checkpoint, clear_partial, latest_checkpoint, partial_folder, publish
from skvr_dist.checkpoint.weights import WeightFiles, save_weights
from skvr_dist.errors import UserError
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.parity.cases import LAYOUTS, Case, batches
from skvr_dist.parity.ranks import run_ranks
from skvr_dist.train.config import Config

SHAPE = Case("single", tied=True).shape
MODEL = ModelConfig.model_validate(SHAPE)
STEPS = 3


def stop_and_go_on(config: Config, changed: Config, folder: str) -> dict[str, Any]:
    """Train on; evaluate and save after the first step; load that into a new engine and train again."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.loop import build_engine, load_state

    mesh = Mesh.build(config.parallel, config.model)

    def train(engine: Any, steps: range) -> list[tuple[float, float, float]]:
        done = []
        for step in steps:
            learning_rate = engine.get_lr()[0]
            mine = iter(batches(STEPS)[step][mesh.replica :: mesh.replicas])
            done.append((learning_rate, engine.train_step(mine, config.plan(step)), engine.gradient_norm))
        return done

    engine = build_engine(config, mesh)
    train(engine, range(1))
    engine.evaluate(list(batches(STEPS)[0][mesh.replica :: mesh.replicas]), [0, 0, 0, 3, 3])
    engine.save_checkpoint(folder, tag=partial_folder(1), save_latest=False)
    if mesh.rank == 0:
        tokenizer = Path(folder) / "any.model"
        tokenizer.write_bytes(b"")
        publish(Path(folder), 1, config_text=config.to_yaml(), facts={"step": 1}, tokenizer=tokenizer)
    dist.barrier()
    straight = train(engine, range(1, STEPS))
    weights = {name: p.detach().clone() for name, p in engine.stage.decoder.named_parameters()}

    resumed = build_engine(changed, mesh)
    load_state(resumed, Checkpoint(Path(folder) / "step-00000001"))
    again = train(resumed, range(1, STEPS))
    same = all(torch.equal(p, weights[name]) for name, p in resumed.stage.decoder.named_parameters())
    return {"straight": straight, "again": again, "same_weights": same}


@pytest.mark.parametrize(("layout", "precision"), [("PP2", "fp32"), ("PP2xDP2 ZeRO-1", "bf16"), ("single", "fp32")])
def test_resume_is_exact(tmp_path: Path, layout: str, precision: str) -> None:
    config = Case(layout, tied=True, precision=precision).config()
    for result in run_ranks(LAYOUTS[layout].ranks, stop_and_go_on, config, config, str(tmp_path)):
        assert result["again"] == result["straight"]
        assert result["same_weights"]


def test_a_resumed_run_has_the_configured_learning_rate(tmp_path: Path) -> None:
    config = Case("DP2 ZeRO-1", tied=True).config()
    train = config.train.model_copy(update={"learning_rate": 0.125})
    changed = config.model_copy(update={"train": train})
    (result,) = run_ranks(1, stop_and_go_on, config, changed, str(tmp_path))
    assert [learning_rate for learning_rate, *_ in result["straight"]] == [config.train.learning_rate] * (STEPS - 1)
    assert [learning_rate for learning_rate, *_ in result["again"]] == [0.125] * (STEPS - 1)
    assert result["again"][0][1] == result["straight"][0][1]  # the first loss is that of the loaded weights
    assert not result["same_weights"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A run's checkpoints, with one of step 5 by two stages."""
    folder = tmp_path / "run/checkpoints"
    write(folder, step=5)
    return folder


def write(folder: Path, step: int, parts: int = 2) -> Path:
    bounds = [(0, 2), (2, 5)] if parts == 2 else [(0, 5)]
    for part, (start, stop) in enumerate(bounds):
        decoder = Decoder(MODEL, start, stop)
        initialize(decoder, seed=step)
        save_weights(folder / partial_folder(step), decoder, part=part, parts=parts)
    (folder / partial_folder(step) / "optimizer.pt").write_bytes(b"state")
    tokenizer = folder / "tokenizer"
    tokenizer.write_bytes(b"pieces")
    config_text = yaml.safe_dump({"model": MODEL.model_dump()})
    return publish(folder, step, config_text=config_text, facts={"step": step}, tokenizer=tokenizer)


def test_a_checkpoint_is_read_in_one_process(checkpoints: Path) -> None:
    whole = Decoder(MODEL)
    initialize(whole, seed=5)
    for path in (checkpoints.parent, checkpoints / "step-00000005"):
        checkpoint = Checkpoint(path)
        assert (checkpoint.step, checkpoint.model_config) == (5, MODEL)
        loaded = dict(checkpoint.load_decoder().named_parameters())
        assert all(torch.equal(loaded[name], parameter) for name, parameter in whole.named_parameters())
        assert checkpoint.weight_names() == sorted(loaded)


def test_nothing_partial_counts(checkpoints: Path) -> None:
    """A save that was interrupted, then done again by fewer stages, leaves only the new one's files."""
    decoder = Decoder(MODEL, 2, 5)
    save_weights(checkpoints / partial_folder(6), decoder, part=1, parts=2)
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000005"
    clear_partial(checkpoints, 6)
    final = write(checkpoints, step=6, parts=1)
    assert sorted(file.name for file in final.glob("model-*")) == ["model-00000-of-00001.safetensors"]
    assert Checkpoint(checkpoints.parent).step == 6
    assert not list(checkpoints.glob("*.partial"))


def test_a_step_that_is_saved_again_replaces_the_first(checkpoints: Path) -> None:
    (checkpoints / "step-00000005/optimizer.pt").write_bytes(b"old")
    final = write(checkpoints, step=5)
    assert (final / "optimizer.pt").read_bytes() == b"state"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000005", "tokenizer"]


def damage_size(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"sta")


def damage_absent(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()


def damage_header(folder: Path) -> None:
    file = folder / "model-00000-of-00002.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)


def damage_facts(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"step": 5')


def damage_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, "optimizer.pt has 3 bytes, not 5"),
        (damage_absent, "model-00001-of-00002.safetensors is missing"),
        (damage_header, "model-00000-of-00002.safetensors are damaged"),
        (damage_facts, "is damaged"),
        (damage_config, "is damaged"),
    ],
)
def test_damage_is_named(checkpoints: Path, damage: Any, message: str) -> None:
    damage(checkpoints / "step-00000005")
    with pytest.raises(UserError, match=message):
        Checkpoint(checkpoints.parent)


def test_weights_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    decoder = Decoder(MODEL)
    save_weights(tmp_path, decoder, part=0, parts=1)
    save_weights(tmp_path, decoder, part=1, parts=2)
    with pytest.raises(UserError, match="are not one complete set"):
        WeightFiles(tmp_path)


def test_weights_of_another_architecture_are_refused(checkpoints: Path) -> None:
    files = WeightFiles(checkpoints / "step-00000005")
    with pytest.raises(UserError, match=r"has no weight lm_head.weight; it is a checkpoint of another architecture"):
        files.copy_into(Decoder(ModelConfig.model_validate({**SHAPE, "tie_word_embeddings": False})))
    wider = ModelConfig.model_validate({**SHAPE, "vocab_size": 128})
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \[97, 32\] in .*, but \[128, 32\]"):
        files.copy_into(Decoder(wider))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text(json.dumps("step-00000001"))
    with pytest.raises(UserError, match="damaged"):
        Checkpoint(tmp_path)
