"""The average of a run's last checkpoints: what is in it, who reads it, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support.datasets import TOKENIZER
from support.hf_models import export_checkpoint, random_weights, shape_of

from skvr_dist.checkpoint.average import last_checkpoints, shares, write_average
from skvr_dist.checkpoint.facts import Facts, GuardFacts
from skvr_dist.checkpoint.folder import TOKENIZER_FILE, Checkpoint, partial_folder, publish, step_folder, write_facts
from skvr_dist.checkpoint.pieces import WEIGHTS, Piece
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.config.load import dump_config, load_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.train.resume import preview_resume

ROOT = Path(__file__).parents[2]
MODEL = shape_of("qwen3", vocab_size=512)
STEPS = (10, 20, 30, 40)


def config_of(run: Path) -> Config:
    quickstart = load_config([ROOT / "configs/experiment/quickstart.yaml"], [f"train.output_dir={run}"])
    return quickstart.model_copy(update={"model": MODEL})


def weights_of(step: int) -> dict[str, torch.Tensor]:
    return {name: weight + step / 7 for name, weight in random_weights(MODEL).items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with four checkpoints, each with moments."""
    for step in STEPS:
        partial = tmp_path / "run/checkpoints" / partial_folder(step)
        partial.mkdir(parents=True)
        guard = GuardFacts(losses=[1.0], skipped_steps=0, skipped_in_a_row=0)
        facts = Facts(step=step, tokens_seen=96 * step, data_fingerprint={}, guard=guard, adam_steps=step)
        files = {TOKENIZER_FILE: TOKENIZER.model}
        write_facts(partial, config_text=dump_config(config_of(tmp_path / "run")), facts=facts, files=files)
        tensors = {WEIGHTS + name: weight for name, weight in weights_of(step).items()}
        tensors |= {f"first.{name}": weight for name, weight in weights_of(step).items()}
        pieces = {name: [Piece(tuple(t.shape), (0,) * t.dim(), t)] for name, t in tensors.items()}
        digests = write_pieces(partial, pieces)
        publish(partial, partial.with_name(step_folder(step)), digests)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("count", "decay", "counts"),
    [(2, None, [1 / 2] * 2), (4, None, [1 / 4] * 4), (3, 0.5, [1 / 7, 2 / 7, 4 / 7]), (2, 0.9, [0.9 / 1.9, 1 / 1.9])],
)
def test_the_weights_are_the_mean(
    run: Path, tmp_path: Path, count: int, decay: float | None, counts: list[float]
) -> None:
    assert shares(count, decay) == pytest.approx(counts)
    folder = write_average(last_checkpoints(run, count), decay, tmp_path / "out")
    average = Checkpoint(folder, verify=True)
    trained = [weights_of(step) for step in STEPS[-count:]]
    assert sorted(average.weight_names()) == sorted(trained[0])
    for name in average.weight_names():
        wanted = sum(share * weights[name].double() for share, weights in zip(counts, trained, strict=True))
        torch.testing.assert_close(average.weight(name), wanted.float(), rtol=2e-7, atol=1e-8)  # type: ignore[union-attr]
    assert (average.step, average.facts.tokens_seen, average.facts.adam_steps) == (40, 96 * 40, None)
    assert average.facts.averaged is not None and average.facts.averaged.steps == list(STEPS[-count:])
    assert (folder / "tokenizer.model").read_bytes() == TOKENIZER.model and average.config == Checkpoint(run).config


def test_the_mean_of_equal_weights_is_these_weights_to_the_bit(run: Path, tmp_path: Path) -> None:
    newest = Checkpoint(run)
    average = Checkpoint(write_average([newest] * 3, 0.7, tmp_path / "out"))
    assert all(torch.equal(average.weight(name), newest.weight(name)) for name in newest.weight_names())


def test_others_read_it(run: Path, tmp_path: Path) -> None:
    """A new run starts from it, which does not resume from it; and it is exported."""
    out = tmp_path / "out"
    average = Checkpoint(write_average(last_checkpoints(run, 3), None, out))
    config = config_of(tmp_path / "new")
    start = config.model_copy(update={"train": config.train.model_copy(update={"initial_weights": str(out)})})
    assert preview_resume(start, {}) is None
    for keys in ({"resume": str(out)}, {"output_dir": str(out), "initial_weights": str(out)}):
        resumes = config.model_copy(update={"train": config.train.model_copy(update=keys)})
        with pytest.raises(UserError, match=r"holds weights only; start .*, in another train.output_dir than that of"):
            preview_resume(resumes, {})
    export_checkpoint(out, tmp_path / "hf")
    assert "weights of the steps 20, 30, 40" in (tmp_path / "hf/README.md").read_text()
    assert torch.equal(average.load_decoder().get_parameter("norm.weight"), average.weight("norm.weight"))


def test_a_checkpoint_of_a_kernel_for_gpus_is_evaluated_with_what_is_there(run: Path) -> None:
    (checkpoint,) = last_checkpoints(run, 1)
    wanted = {"fa4": "auto", "flash": "auto", "routed": "auto", "sdpa": "sdpa", "eager": "eager"}
    for trained_with, evaluated_with in wanted.items():
        checkpoint.model_config = checkpoint.model_config.model_copy(update={"attention": trained_with})
        assert checkpoint.load_decoder().config.attention == evaluated_with


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def average(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tools/average.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/average.py"), run_name="__main__")
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.out + shown.err
        return shown.out + shown.err

    out, file = str(tmp_path / "out"), tmp_path / "average.json"
    shown = average(str(run), out, "--last", "2", "--decay", "0.5", "--json", str(file))
    assert "66.7%" in shown and f"written: {out}/checkpoints/{step_folder(40)}" in shown
    assert json.loads(file.read_text())["steps"] == [30, 40]
    assert "exists and is not an empty folder; choose another one" in average(str(run), out, code=2)
    other = str(tmp_path / "other")
    assert "has 4 checkpoints, but 5 are to be averaged; use fewer" in average(str(run), other, "--last", "5", code=2)
    one = str(run / "checkpoints" / step_folder(40))
    assert f"{one} is not the folder of a run that saved checkpoints" in average(one, other, code=2)
    assert "--decay 1.5 must be between 0 and 1" in average(str(run), other, "--decay", "1.5", code=2)
    assert "1 is less than 2" in average(str(run), other, "--last", "1", code=2)
    shard = next((run / "checkpoints" / step_folder(30)).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = average(str(run), other, code=2)
    assert f"{run}/checkpoints/{step_folder(30)}" in said and "changed since it was written" in said, said
    assert not Path(other).exists() and not list(tmp_path.glob("other*"))
