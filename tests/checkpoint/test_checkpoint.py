"""Checkpoints: any layout resumes from any other's, in any precision; damage is seen; nothing unfinished counts."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.programs import run_here
from support.tokenizers import train_hugging_face
from support.trainers import start_from_weights

from skvr_dist.checkpoint.facts import FORMAT, OLDEST_FORMAT
from skvr_dist.checkpoint.folder import (
    Checkpoint,
    candidates,
    forget_old,
    partial_folder,
    publish,
    set_aside,
    step_folder,
)
from skvr_dist.checkpoint.pieces import pieces_of
from skvr_dist.config.model import ModelConfig
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.lab.verify import reference
from skvr_dist.lab.verify.cases import CLIP, LAYOUTS, OPTIMIZER, SEED, SHAPE, Case, batches
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.lab.verify.reshard import Trainer, reshard
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.model.modules import TensorShard
from skvr_dist.parallel.engine.optimizers import state_to_save
from skvr_dist.train.build import build_saver
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.resume import resume, resume_candidates, settle_resume
from skvr_dist.train.state import load_state, load_weights, progress_facts, require_weights_fit


@given(st.data())
def test_pieces_cover_a_flat_slice_exactly(data: st.DataObject) -> None:
    """However a matrix is sharded and its shards are cut, their pieces make the matrix, each element once."""
    rows, columns, parts = (data.draw(st.integers(1, most)) for most in (7, 7, 3))
    dim = data.draw(st.sampled_from([0, 1]))
    whole = torch.arange(rows * columns).view(rows, columns)
    rebuilt = torch.full_like(whole, -1)
    share = -(-whole.shape[dim] // parts)
    for first in range(0, whole.shape[dim], share):
        length = min(share, whole.shape[dim] - first)
        shard = TensorShard((rows, columns), dim, first, length)
        local = shard.cut(whole).contiguous()
        if dim == 0:  # padded below, as the vocabulary is
            local = torch.cat((local, torch.full((share - length, columns), -2)))
        cuts = sorted(data.draw(st.lists(st.integers(0, local.numel()), max_size=3)))
        for start, stop in zip([0, *cuts], [*cuts, local.numel()], strict=True):
            found = pieces_of(shard, tuple(local.shape), local.flatten()[start:stop], start)
            assert len(found) <= 3
            for piece in found:
                (y, x), (height, width) = piece.offsets, piece.tensor.shape
                assert (rebuilt[y : y + height, x : x + width] == -1).all()
                rebuilt[y : y + height, x : x + width] = piece.tensor
    assert torch.equal(rebuilt, whole)


@pytest.mark.parametrize("layouts", [["single", "PP2xDP2 ZeRO-1"], ["TP2xDP2 ZeRO-3", "DP2 ZeRO-2"]], ids=" ".join)
def test_any_layout_goes_on_in_any_other(tmp_path: Path, layouts: list[str]) -> None:
    outcomes = list(reshard(layouts, tmp_path))
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert not outcome.missed, outcome
        if outcome.source == outcome.target:
            assert (outcome.loss, outcome.moments, outcome.tensor) == (0.0, 0.0, 0.0)


def train_and_save(case: Case, folder: str, step: int) -> None:
    trainer = Trainer(case, folder)
    trainer.train(range(step))
    trainer.save(step)


def go_on(case: Case, saved: str, folder: str) -> list[float]:
    trainer = Trainer(case, folder)
    load_state(trainer.engine, Checkpoint(saved))
    return trainer.train(range(2, 4))


def read_share(case: Case, folder: str) -> float:
    return Trainer(case, folder).load(Path(folder) / "checkpoints" / step_folder(1))


@pytest.mark.parametrize(
    ("saved_by", "read_by"),
    [
        ("DP2 ZeRO-0", "DP2 ZeRO-0"),
        ("PP2xDP2 ZeRO-1", "PP2xDP2 ZeRO-1"),
        ("single", "DP2 ZeRO-3"),
        ("single", "TP2xPP2"),
    ],
)
def test_a_resume_reads_every_byte_once(tmp_path: Path, saved_by: str, read_by: str) -> None:
    """Over all ranks: replicas, stages of a tied embedding and tensor-parallel ranks tell each other what is read."""
    saving, reading = (Case(layout, tied=True) for layout in (saved_by, read_by))
    run_ranks(LAYOUTS[saved_by].ranks, train_and_save, saving, str(tmp_path), 1)
    assert run_ranks(LAYOUTS[read_by].ranks, read_share, reading, str(tmp_path))[0] == pytest.approx(1.0, abs=0.01)


def test_bf16_goes_on_exactly(tmp_path: Path) -> None:
    """On the same layout bit for bit; on another as close as bf16 gradients are."""
    case = Case("PP2xDP2 ZeRO-1", tied=True, precision="bf16")
    run_ranks(4, train_and_save, case, str(tmp_path / "a"), 2)
    saved = str(tmp_path / "a/checkpoints" / step_folder(2))
    again = [run_ranks(4, go_on, case, saved, str(tmp_path / name))[0] for name in ("b", "c")]
    assert again[0] == again[1]
    other = run_ranks(2, go_on, Case("DP2 ZeRO-3", tied=True, precision="bf16"), saved, str(tmp_path / "d"))[0]
    assert other == pytest.approx(again[0], rel=1e-3)
    checkpoint = Checkpoint(saved)
    assert checkpoint.index.dtype("weights.norm.weight") == torch.float32  # the master
    assert checkpoint.weight("norm.weight").dtype == torch.bfloat16  # what was trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, of step 1, by two stages."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, train_and_save, Case("PP2", tied=True), str(folder), 1)
    return folder


@pytest.fixture
def run_folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_checkpoint_is_read_in_one_process(run_folder: Path) -> None:
    for path in (run_folder, run_folder / "checkpoints/step-00000001"):
        checkpoint = Checkpoint(path, verify=True)
        assert (checkpoint.step, checkpoint.model_config) == (1, Case("PP2", tied=True).config().model)
        loaded = dict(checkpoint.load_decoder().named_parameters())
        assert checkpoint.weight_names() == sorted(loaded)
        assert all(torch.equal(checkpoint.weight(name), parameter) for name, parameter in loaded.items())
    assert (run_folder / "checkpoints/latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize("layout", ["TP2xDP2 ZeRO-3", "DP2 ZeRO-1"])
def test_a_new_run_starts_from_weights_alone(tmp_path: Path, layout: str) -> None:
    """As the reference does from those weights: at the first step, with moments of zero."""
    case, saved = Case("single", tied=True), tmp_path / "saved"
    run_ranks(1, train_and_save, case, str(saved), 2)
    checkpoint = Checkpoint(saved)
    weights = {name: checkpoint.weight(name) for name in checkpoint.weight_names()}
    plans = [plan_of_step(case.config(), step).donors.tolist() for step in range(2)]
    wanted = reference.train(weights, case.shape, batches(2), plans, clip=CLIP, optimizer=OPTIMIZER)["losses"]
    other = Case(layout, tied=True)
    for losses in run_ranks(LAYOUTS[layout].ranks, start_from_weights, other, str(saved)):
        assert losses == pytest.approx(wanted, rel=1e-6)


def go_on_here(case: Case, folder: str) -> Any:
    config = case.config()
    train = config.train.model_copy(update={"output_dir": folder})
    data = config.data.model_copy(update={"on_resume": "other_data"})
    config = config.model_copy(update={"train": train, "data": data})
    try:
        resumed, left_out = resume(Trainer(case, folder).engine, config, {})
    except UserError as error:
        return str(error)
    return resumed and resumed.step, left_out


def test_a_damaged_checkpoint_is_left_out_for_the_one_before(run_folder: Path) -> None:
    case, checkpoints = Case("DP2 ZeRO-1", tied=True), run_folder / "checkpoints"
    for step in (2, 3):
        shutil.copytree(checkpoints / "step-00000001", checkpoints / step_folder(step))
    (checkpoints / "step-00000004.partial").mkdir()
    tensors = next((checkpoints / "step-00000003").glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    (checkpoints / "step-00000002/index.json").unlink()
    for step, left_out in run_ranks(2, go_on_here, case, str(run_folder)):
        assert step == 1
        assert f"step-00000003 is damaged: {tensors.name} changed since it was written" in left_out[0]
        assert "step-00000002 is damaged: index.json is missing" in left_out[1]
    (checkpoints / "step-00000001/manifest.json").unlink()
    for message in run_ranks(2, go_on_here, case, str(run_folder)):
        assert message.startswith("no checkpoint is left to resume from: ")
        assert "step-00000001 is incomplete (No such file or directory" in message


def test_old_checkpoints_are_forgotten(tmp_path: Path) -> None:
    for step in range(100, 700, 100):
        (tmp_path / step_folder(step)).mkdir()
    (tmp_path / "step-00000700.partial").mkdir()
    forget_old(tmp_path, keep_last=2, keep_every_steps=300)
    assert [path.name[-3:] for path in candidates(tmp_path)] == ["600", "500", "300"]
    forget_old(tmp_path, keep_last=1, keep_every_steps=None)
    assert [path.name[-3:] for path in candidates(tmp_path)] == ["600"]


def test_of_a_checkpoint_that_was_moved_away_the_link_goes(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2):
        (elsewhere / step_folder(step)).mkdir(parents=True)
        run.mkdir(exist_ok=True)
        (run / step_folder(step)).symlink_to(f"../elsewhere/{step_folder(step)}")
    forget_old(run, keep_last=1, keep_every_steps=None)
    assert candidates(run) == [run / step_folder(2)]
    assert set_aside(run / step_folder(2)).resolve() == elsewhere / step_folder(2)
    assert candidates(run) == [] and len(candidates(elsewhere)) == 2


def save_where_nothing_fits(case: Case, folder: str) -> str:
    trainer = Trainer(case, folder)
    trainer.save(0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a file grows no further, as on a full disk
    with pytest.raises(UserError) as raised:
        trainer.save(1)
    return str(raised.value)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / partial_folder(7)  # by a save that a signal had begun, and SIGKILL ended
    left.mkdir(parents=True)
    for message in run_ranks(2, save_where_nothing_fits, Case("PP2", tied=True), str(tmp_path)):
        assert "step-00000001.partial could not be written" in message
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000000", "latest"}
    Checkpoint(tmp_path, verify=True)


def load_into_another(case: Case, folder: str) -> str:
    trainer = Trainer(case, folder + "-new")
    with pytest.raises(UserError) as raised:
        load_weights(trainer.engine, Checkpoint(folder))
    return str(raised.value)


def test_weights_of_another_architecture_are_refused(run_folder: Path) -> None:
    (message,) = run_ranks(1, load_into_another, Case("single", tied=False), str(run_folder))
    assert "have model.tie_word_embeddings True, the configuration False" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 4), ("num_hidden_layers", 6), ("hidden_size", 64), ("vocab_size", 96), ("head_dim", 16)],
)
def test_initial_weights_of_another_shape_are_refused(run_folder: Path, key: str, value: int) -> None:
    checkpoint = Checkpoint(run_folder)
    model = checkpoint.model_config.model_copy(update={"rope_theta": 5e5, "attention": "eager"})
    require_weights_fit(checkpoint, model)  # neither has weights
    with pytest.raises(UserError, match=rf"have model.{key} {SHAPE[key]}, the configuration {value}; give the ch"):
        require_weights_fit(checkpoint, model.model_copy(update={key: value}))


def steps_of(folder: Path) -> list[str]:
    return [path.name.removeprefix("step-0000000") for path in candidates(folder)]


def test_going_back_sets_newer_checkpoints_aside(run_folder: Path, tmp_path: Path) -> None:
    checkpoints, case = run_folder / "checkpoints", Case("single").config()
    for step in (2, 3):
        shutil.copytree(checkpoints / "step-00000001", checkpoints / step_folder(step))
    other = Path(shutil.copytree(checkpoints / "step-00000002", tmp_path / "other/checkpoints" / step_folder(2)))

    def start(asked: str) -> list[str]:
        """What a run that is told this resumes from, in order; it then follows the first."""
        train = case.train.model_copy(update={"output_dir": str(run_folder), "resume": asked})
        config = case.model_copy(update={"train": train})
        found = resume_candidates(config)
        for path in settle_resume(config, Checkpoint(found[0])):
            Checkpoint(path, verify=True)
        newest = candidates(checkpoints)
        latest = checkpoints / "latest"
        assert latest.exists() == bool(newest) and (not newest or latest.read_text() == f"{newest[0].name}\n")
        return [str(path) for path in found]

    second = str(checkpoints / "step-00000002")
    assert start(second) == [second]
    assert steps_of(checkpoints) == ["2", "1"] and steps_of(checkpoints / "set-aside") == ["3"]
    # Interrupted after a step more, and started again as it was: not from step 2 once more.
    third = shutil.copytree(second, checkpoints / "step-00000003")
    assert start(second)[0] == start("auto")[0] == str(third)
    # After another start the same words mean to go back again, and what is set aside is kept.
    start(second)
    assert steps_of(checkpoints) == ["2", "1"]
    assert {path.name for path in (checkpoints / "set-aside").iterdir()} == {"step-00000003", "step-00000003.2"}
    # A checkpoint of elsewhere: nothing here is of that training.
    assert start(str(other)) == [str(other)]
    assert steps_of(checkpoints) == []
    shutil.copytree(other, checkpoints / "step-00000003")
    assert start(str(other)) == [str(checkpoints / "step-00000003"), str(other)]
    assert steps_of(checkpoints) == ["3"]


def save_with_tokenizer(case: Case, folder: str, tokenizer: str) -> None:
    config, trainer = case.config(), Trainer(case, folder)
    train = config.train.model_copy(update={"output_dir": folder})
    config = config.model_copy(update={"train": train, "data": config.data.model_copy(update={"tokenizer": tokenizer})})
    saver = build_saver(config)
    saver.save(state_to_save(trainer.engine), progress_facts(trainer.engine, 0, tokens_seen=0), lambda folder: None)
    saver.finish()


@pytest.mark.parametrize("name", ["hf", "hf/tokenizer.json", "tokenizer.model"])
def test_any_kind_of_tokenizer_travels_with_a_checkpoint(tmp_path: Path, name: str) -> None:
    """A folder, a file of it, and the one file that data sets keep; exports convert that one."""
    one_file = train_hugging_face(tmp_path / "tokenizer.model")
    run_ranks(1, save_with_tokenizer, Case("single"), str(tmp_path / "run"), str(tmp_path / name))
    saved = Checkpoint(tmp_path / "run").tokenizer_file
    assert saved is not None
    assert load_tokenizer(saved).sha256 == load_tokenizer(one_file).sha256


def test_another_format_and_a_folder_without_a_checkpoint_are_refused(run_folder: Path, tmp_path: Path) -> None:
    for other, kind in ((FORMAT + 1, "newer"), (OLDEST_FORMAT - 1, "older")):
        partial, folder = tmp_path / f"{kind}.partial", tmp_path / kind
        shutil.copytree(run_folder / "checkpoints/step-00000001", partial, ignore=shutil.ignore_patterns("manifest.*"))
        facts = partial / "checkpoint.json"
        facts.write_text(facts.read_text().replace(f'"format": {FORMAT}', f'"format": {other}'))
        publish(partial, folder, {})
        with pytest.raises(UserError, match=rf"has format {other}, {kind} than this release's {FORMAT}; u"):
            Checkpoint(folder)
    with pytest.raises(UserError, match="is neither a checkpoint"):
        Checkpoint(tmp_path / "nothing")


def test_inspect(run_folder: Path) -> None:
    def inspect(code: int) -> str:
        return run_here("tools/inspect_checkpoint.py", str(run_folder), "--tensors", code=code)

    output = inspect(0)
    assert "| exp_avg.layers.4.mlp.up_proj.weight" in output and "all whole" in output
    tensors = next((run_folder / "checkpoints/step-00000001").glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    refused = inspect(2)
    assert refused.startswith("error: ") and refused.count("\n") == 1


def test_initial_weights_do_not_depend_on_the_split() -> None:
    config = ModelConfig.model_validate(Case("single").shape)
    whole, part = Decoder(config), Decoder(config, 2, 4)
    for decoder in (whole, part):
        initialize(decoder, SEED)
    drawn = dict(whole.named_parameters())
    assert all(torch.equal(parameter, drawn[name]) for name, parameter in part.named_parameters())
