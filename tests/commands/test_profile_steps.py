"""`tools/profile_steps.py`: a trace per rank that a viewer can open, with the parts of each step."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from support.datasets import TOKENIZER, write_dataset

ROOT = Path(__file__).parents[2]
SMALL = ["model.num_hidden_layers=2", "model.hidden_size=32", "model.intermediate_size=48", "train.global_batch_size=4",
         "train.micro_batch_size=2", "data.sequence_length=16", "data.lanes=4", "data.workers=0", "parallel.pipeline=1",
         "evaluate.sequences=2"]  # fmt: skip


def test_a_trace_has_the_parts_of_each_step(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [[[5 + n, 6, 7] * 30] for n in range(4)])
    TOKENIZER.save(tmp_path / "tokenizer.model")
    keys = [*SMALL, *(f"data.{key}={tmp_path}/set" for key in ("train", "validation"))]
    keys += [f"data.tokenizer={tmp_path}/tokenizer.model", f"train.output_dir={tmp_path}/run"]
    command = ["tools/profile_steps.py", "--config", "quickstart", "--output", f"{tmp_path}/traces", "--warmup", "1"]
    command += ["--steps", "2", "--json", f"{tmp_path}/found.json", *keys]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
    (rank,) = json.loads((tmp_path / "found.json").read_text())["ranks"]
    assert rank["file"] == f"{tmp_path}/traces/rank-00000.json.gz" and rank["file"] in done.stdout
    assert 0 < rank["parts"]["forward"] < rank["step_seconds"]
    assert [file.name for file in (tmp_path / "traces").iterdir()] == ["rank-00000.json.gz"]

    with gzip.open(rank["file"], "rt") as opened:
        events = [event for event in json.load(opened)["traceEvents"] if event.get("ph") == "X"]
    steps = sorted((e for e in events if e["name"] in ("step 2", "step 3")), key=lambda e: e["ts"])
    assert [step["name"] for step in steps] == ["step 2", "step 3"]
    for step in steps:
        within = [e["name"] for e in events if step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"]]
        for part in ("LoadMicroBatch", "ForwardPass", "BackwardPass"):
            assert [name for name in within if name.startswith(part)] == [f"{part} 0", f"{part} 1"]
        assert within.count("OptimizerStep") == 1 and "aten::mm" in within
