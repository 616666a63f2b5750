"""Timing generation: the largest batch, what running out of memory leaves, and the paper's figures beside ours."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_models import routed_model, shape_of

from skvr_dist.commands import bench
from skvr_dist.commands.bench.generate import Engine
from skvr_dist.commands.bench.generate_tables import speed_table
from skvr_dist.config.load import load_model_config
from skvr_dist.config.presets import find_configs
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.lab.bench import generate, memory
from skvr_dist.lab.bench.generate import LargestBatch, Speed, measure_speed, random_prompt
from skvr_dist.lab.bench.paper import paper_row

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("right", "most", "tried"), [(0, 64, [1]), (5, 64, [1, 2, 4, 8, 6, 5]), (9, 9, [1, 2, 4, 8, 9])]
)
def test_doubling_then_bisecting(right: int, most: int, tried: list[int]) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= right

    assert memory.largest(fits, most) == right and asked == tried


def test_an_export_is_timed(tmp_path: Path) -> None:
    """By a process that imports what the command does alone: in this one the Auto classes know caches anyway."""
    routed_model(shape_of("qwen3")).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--strategies", "every:2", "--prompt-tokens", "8", "--new-tokens", "2"]
    command = [sys.executable, str(ROOT / "tools/bench.py"), "generate", *words, "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "every:2" in done.stdout, done.stderr


def test_the_largest_is_never_beyond_what_may_be_tried() -> None:
    for most in range(1, 20):
        for right in range(25):
            assert memory.largest(lambda number, right=right: number <= right, most) == min(right, most)  # type: ignore[misc]


def test_a_peak_is_seen_and_a_limit_holds() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    memory.reset_peak(CPU)
    start = memory.peak_bytes(CPU)
    torch.ones(40 * 2**20, dtype=torch.uint8)
    grown = memory.peak_bytes(CPU)
    memory.reset_peak(CPU)
    after = memory.peak_bytes(CPU)
    assert start and grown and after
    assert 35 * 2**20 < grown - start < 60 * 2**20 and grown - after > 30 * 2**20
    with memory.limited(CPU, after + 50 * 2**20):
        with pytest.raises(RuntimeError) as failed:
            torch.empty(2**30, dtype=torch.uint8)
        assert memory.is_out_of_memory(failed.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(UserError, match=r"--memory-gib 0\.000\d+ is less than the"), memory.limited(CPU, 2**20):
        pass


def test_a_strategy_that_runs_out_of_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the paper's batch of 16, which only the smaller cache has room for; the others are measured."""
    model, seconds = routed_model(shape_of("qwen3")), generate._seconds

    def in_small_memory(*given: object) -> tuple[float, float, int]:
        if len(model.retained_layers) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "_seconds", in_small_memory)
    full, quarter = measure_speed(model, random_prompt(model, 2, 6), 2, ["full", "every:4"], rounds=2)
    assert full.ran_out_of_memory and not full.decode_seconds and full.peak_bytes is None
    assert len(quarter.decode_seconds) == 2 and quarter.ratio_to(full, "decode_seconds") is None
    assert quarter.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, elements, bytes
    table = speed_table([full, quarter], 2, beside_paper=False).splitlines()
    assert "out of memory" in table[2] and "every:4" in table[3]


def engine_of(config: Any, device: str, dtype: str) -> Engine:
    """What is measured, of which nothing is."""
    return Engine(
        config, ["full"], torch.device(device), dtype, lambda *_: [], lambda *_: LargestBatch("full", 1, 0, None, [])
    )


def test_the_papers_figures_stand_beside_ours() -> None:
    papers = shape_of(
        "qwen3", num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=4096
    )
    config = hf_config(papers, torch.bfloat16, {})
    assert engine_of(config, "cuda", "bfloat16").is_papers
    assert not engine_of(config, "cuda", "float32").is_papers and not engine_of(config, "cpu", "bfloat16").is_papers
    assert not engine_of(hf_config(shape_of("qwen3"), torch.bfloat16, {}), "cuda", "bfloat16").is_papers
    assert paper_row("every:2", 8192, 4) is None and paper_row("full", 1000, 1) is None
    cases = [("full", 8192, 1), ("every:4", 8192, 16), ("full", 8192, 16)]
    speeds = [Speed(name, 1.0, tokens, batch, 147456, 10**9, False, [0.3], [2.0]) for name, tokens, batch in cases]
    speeds[2].ran_out_of_memory = True
    rows = [
        [cell.strip() for cell in line.split("|")[-5:-1]] for line in speed_table(speeds, 64, True).splitlines()[2:]
    ]
    assert rows == [["1,170", "297", "34", ""], ["", "4,696", "8", "60,306"], ["", "", "", "out of memory"]]


def test_the_shape_is_that_of_all_files_with_what_they_include(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("model: {intermediate_size: 512}\n")
    shape = load_model_config([*find_configs(["experiment/quickstart"]), tmp_path / "wide.yaml"], vocab_size=600)
    assert (shape.hidden_size, shape.intermediate_size, shape.vocab_size) == (128, 512, 600)
    with pytest.raises(UserError, match=r"no model section is in .*pp2\.yaml; give a file of configs/model"):
        load_model_config(find_configs(["parallel/pp2"]))


def test_a_damaged_export_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["skvr-bench", "generate", "--model", str(tmp_path)])
    for content in ("{}", '{"model_type":'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=f"--model {tmp_path} cannot be read .*; export it again"):
            bench.run()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def started(*more: str) -> int | None:
        words = ["generate", "--prompt-tokens", "4", "--new-tokens", "1", "--rounds", "1", *more]
        monkeypatch.setattr(sys, "argv", ["skvr-bench", *words])
        return bench.run()

    found, both = tmp_path / "found.json", ("--strategies", "prefix:4", "--batch", "1", "2")
    assert started(*both, "--memory-gib", "30", "--most-batch", "3", "--bound", "0", "--json", str(found)) == 1
    shown = capsys.readouterr().out
    assert "time to first token of prefix:4 at 4 tokens of prompt and a batch of 1" in shown and "3 or more" in shown
    record = json.loads(found.read_text())
    cases = [(speed["strategy"], speed["batch"]) for speed in record["speeds"]]
    assert cases == [("full", 1), ("prefix:4", 1), ("full", 2), ("prefix:4", 2)]
    assert [each["tried"] for each in record["largest_batches"]] == [[1, 2, 3]] * 2
    assert started("--strategies", "every:2", "--bound", "0") == 0  # which has no figure
    with pytest.raises(UserError, match="cache strategy every:0 needs a group of at least 1 layer"):
        started("--strategies", "every:0")
