"""Every reader of a checkpoint refuses one that is not what was written, and names the file."""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch.distributed as dist
import yaml
from support.datasets import write_dataset
from tokenizers import models, pre_tokenizers

from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import Checkpoint, publish, step_folder, write_facts
from skvr_dist.checkpoint.storage import INDEX_FILE
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import tokenizer_from_bytes
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.lab.verify.reshard import Trainer
from skvr_dist.train.resume import resume
from skvr_dist.train.state import load_state, load_weights

TOOLS = Path(__file__).parents[2] / "tools"
FLIPS = 50


def small_tokenizer() -> Tokenizer:
    """Of 90 words: the decoders of the parity cases have 97 embeddings."""
    words = tokenizers.Tokenizer(models.WordLevel({**{f"w{n}": n for n in range(89)}, "</s>": 89}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer_from_bytes(json.dumps({"eos_token": "</s>", "tokenizer": json.loads(words.to_str())}).encode())


def train_and_save(case: Case, folder: str) -> None:
    trainer = Trainer(case, folder)
    trainer.train(range(1))
    trainer.save(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of two stages, and everything that its readers want besides."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(2, train_and_save, Case("PP2", tied=True), str(folder))
    tokenizer = small_tokenizer()
    documents = [[[n % 80, *range(20)] for n in range(shard, 60, 2)] for shard in range(2)]
    write_dataset(folder / "data", documents, tokenizer)
    record = {"step": 1, "train/loss": 1.0, "train/tokens_per_second": 1.0, "routing/skipped_kv_share": 0.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    saved = folder / "checkpoints" / step_folder(1)
    partial = saved.with_suffix(".partial")
    saved.rename(partial)
    for name in ("manifest.json", "manifest.sha256"):
        (partial / name).unlink()
    tree = yaml.safe_load((partial / "config.yaml").read_text())
    tree["data"] |= {"validation": str(folder / "data")}
    stored = json.loads((partial / "checkpoint.json").read_text())
    facts = Facts(**stored | {"data_fingerprint": {}, "tokens_seen": 96, "routing": tree["routing"]})
    write_facts(partial, config_text=yaml.safe_dump(tree), facts=facts, files={"tokenizer.model": tokenizer.model})
    publish(partial, saved, {})
    return folder


Damage = tuple[tuple[str, ...], Callable[[Path], None]]
"""The names of the files, one of which must be named, and what is done to the folder."""


def rewrite(name: str, changed: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(changed((folder / name).read_bytes()))

    return change


def flip(name: str, place: float, bit: int) -> Callable[[Path], None]:
    def flipped(content: bytes) -> bytes:
        position = int(place * len(content))
        return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]

    return rewrite(name, flipped)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def swap(name: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        one, two = ((folder / each).read_bytes() for each in (name, other))
        (folder / name).write_bytes(two)
        (folder / other).write_bytes(one)

    return change


def damages(folder: Path) -> list[Damage]:
    """Flipped bits all over, then each file gone, shorter, longer, and in the place of another."""
    names = sorted(file.name for file in folder.iterdir())
    assert len(names) == 8
    draw = random.Random(0)
    found: list[Damage] = []
    for number in range(FLIPS):
        name = names[number % len(names)]
        found.append(((name,), flip(name, draw.random(), draw.randrange(8))))
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        found.append(((name,), delete(name)))
        found.append(((name,), rewrite(name, lambda content: content[:-1])))
        found.append(((name,), rewrite(name, lambda content: content + b" ")))
        found.append(((name, other), swap(name, other)))
    return found


@contextmanager
def damaged(folder: Path, change: Callable[[Path], None]) -> Iterator[None]:
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    change(folder)
    yield
    for file, content in whole.items():
        file.write_bytes(content)


@pytest.fixture(params=["digests of tensors", "digests of files"])
def run(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Path:
    """A copy of the run; or as releases before digests of tensors wrote it."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    if request.param == "digests of files":
        saved = run / "checkpoints" / step_folder(1)
        partial = saved.rename(saved.with_suffix(".partial"))
        for name in ("manifest.json", "manifest.sha256"):
            (partial / name).unlink()
        tensors = json.loads((partial / INDEX_FILE).read_text())
        for tensor in tensors.values():
            del tensor["sha256"]
        (partial / INDEX_FILE).write_text(json.dumps(tensors))
        publish(partial, saved, {})
    return run


def command(tool: str, *arguments: str | Path) -> int:
    """Run a tool in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", [tool, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_every_tool_refuses_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = run / "checkpoints" / step_folder(1), tmp_path / "out"
    out.mkdir()
    data: list[str | Path] = ["--data", run / "data", "--json", out / "retention.json", "--sequences", "8"]
    readers: list[tuple[str | Path, ...]] = [
        ("inspect_checkpoint", folder),
        ("export_hf", folder, out / "export"),
        ("retention", folder, "--strategies", "full", *data),
        ("report", "--standard", run, "--routed", run, "--output", out / "report", "--sequences", "8"),
    ]
    for names, change in damages(folder):
        with damaged(folder, change):
            for tool, *arguments in readers:
                assert command(str(tool), *arguments) == 2, (tool, names)
                said = capsys.readouterr().err.splitlines()[-1]
                assert said.startswith(f"error: checkpoint {folder} "), (tool, names, said)
                assert any(name in said for name in names), (tool, names, said)
                assert not [file for file in out.rglob("*") if file.is_file()], (tool, names)
    for tool, *arguments in readers[:3]:  # so it was not for another reason
        assert command(str(tool), *arguments) == 0, capsys.readouterr().err


def refused_by_ranks(case: Case, run: str) -> list[tuple[tuple[str, ...], list[str]]]:
    """What the readers that train say to each damage."""
    folder = Path(run) / "checkpoints" / step_folder(1)
    engine = Trainer(case, f"{run}-new").engine
    config = case.config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"resume": str(folder)})})
    readers: list[Callable[[], Any]] = [
        lambda: load_state(engine, Checkpoint(folder)),
        lambda: load_weights(engine, Checkpoint(folder)),
        lambda: resume(engine, config, {}),
    ]
    said: list[tuple[tuple[str, ...], list[str]]] = []
    for names, change in [*damages(folder), ((), lambda folder: None)]:
        with damaged(folder, change) if dist.get_rank() == 0 else nullcontext():
            dist.barrier()
            answers = []
            for read in readers:
                try:
                    read()
                    answers.append("read")
                except UserError as error:
                    answers.append(str(error))
            dist.barrier()
        dist.barrier()
        said.append((names, answers))
    return said


@pytest.mark.parametrize(
    "content", ["null", "[]", '{"format": "x"}', '{"format": 2, "a": 1}', "[" * 100_000, "{: ]", "\0"], ids=range(7)
)
@pytest.mark.parametrize("name", ["checkpoint.json", "config.yaml", INDEX_FILE, "manifest.json"])
def test_content_that_somebody_wrote_by_hand_is_refused(trained: Path, tmp_path: Path, name: str, content: str) -> None:
    """With digests that fit: no reader trips over it."""
    saved = Path(shutil.copytree(trained / "checkpoints" / step_folder(1), tmp_path / "saved"))
    (saved / name).write_text(content)
    if name != "manifest.json":
        record = json.loads((saved / "manifest.json").read_text())
        data = content.encode()
        record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (saved / "manifest.json").write_text(json.dumps(record))
    manifest = (saved / "manifest.json").read_bytes()
    (saved / "manifest.sha256").write_text(hashlib.sha256(manifest).hexdigest())
    with pytest.raises(UserError, match=r"checkpoint .*/saved (is damaged|has format)"):
        Checkpoint(saved)


def test_every_rank_that_would_train_refuses_damage(run: Path) -> None:
    """On another layout than the one that saved, so that ranks read parts of files."""
    for said in run_ranks(2, refused_by_ranks, Case("DP2 ZeRO-1", tied=True), str(run)):
        *refused, (_, untouched) = said
        assert len(refused) == FLIPS + 4 * 8 and untouched == ["read"] * 3
        for names, answers in refused:
            for answer in answers:
                assert "checkpoint" in answer and any(name in answer for name in names), (names, answers)
