"""Kill a small run's ranks at random moments, keep it running, and hold its weights against an undisturbed run's.

    python tools/kill_test.py --kills 30 --json kill_test.json

Prepares a little text of Python's standard library and trains on it twice at the same time: without disturbance, and
under launch/keep_running.py with one rank or all of them killed (SIGKILL) during steps, evaluations and saves. Exits 1
when the run did not take all kills, or when a weight differs by more than the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tabulate import tabulate

from skvr_dist.cluster.launcher import free_port
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.tokenizers.base import train_tokenizer
from skvr_dist.errors import EXIT_MISSED, RunInterrupted, run_command
from skvr_dist.lab.verify.kills import kill_while_it_runs, largest_difference

ROOT = Path(__file__).parents[1]
BOUND = 1e-6
SMALL = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.warmup_steps": 1,
    "data.sequence_length": 64,
    "data.lanes": 4,
    "evaluate.every_steps": 2,
    "evaluate.sequences": 8,
    "checkpoint.every_steps": 2,
    "parallel.timeout_seconds": 60.0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="a multiple of 2 stages (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    steps = 3 * options.kills + 24
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data")
        calm, killed = folder / "calm", folder / "killed"
        keeper = [sys.executable, str(ROOT / "launch/keep_running.py"), "--output-dir", str(killed)]
        keeper += ["--restarts", str(options.kills), "--", *pretraining(killed, folder / "data", options.ranks, steps)]
        undisturbed = subprocess.Popen(
            pretraining(calm, folder / "data", options.ranks, steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        kills = kill_while_it_runs(
            keeper, killed, num_ranks=options.ranks, kills=options.kills, steps=steps, seed=options.seed
        )
        console, _ = undisturbed.communicate()
        if undisturbed.returncode != 0:
            raise RunInterrupted(f"the undisturbed run failed:\n{console.decode()}")
        worst, difference = largest_difference(killed, calm)
    passed = len(kills) == options.kills and difference <= BOUND
    counts = Counter((kill.during, "all" if kill.ranks > 1 else "one") for kill in kills)
    rows = [[during, ranks, count] for (during, ranks), count in sorted(counts.items())]
    print(tabulate(rows, headers=["killed during", "ranks", "kills"], tablefmt="github"))
    pause = median(kill.seconds_to_next_start for kill in kills) if kills else 0.0
    print(
        f"\n{len(kills)} of {options.kills} kills in {steps} steps, {pause:.1f} s (median) until the next start; "
        f"largest relative difference of a weight {difference:.1e} ({worst}), bound {BOUND:.0e}: "
        f"{'met' if passed else 'missed'}"
    )
    if options.json:
        record = {"kills": [asdict(kill) for kill in kills], "asked": options.kills, "steps": steps}
        record |= {"ranks": options.ranks, "difference": difference, "worst": worst, "bound": BOUND, "passed": passed}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


def make_data(folder: Path) -> None:
    """A small data set of the running Python's own source."""
    corpus = open_corpus(str(Path(os.__file__).parent / "email"), suffixes=(".py",))
    tokenizer = train_tokenizer(corpus, vocab_size=512, model_type="bpe")
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.model")
    prepare(corpus, tokenizer, folder, num_shards=4, validation_share=0.25, workers=1)


def pretraining(output: Path, data: Path, ranks: int, steps: int) -> list[str]:
    """The command line of a run on 2 stages, on a port of its own."""
    keys = SMALL | {
        "train.steps": steps,
        "train.output_dir": output,
        "data.train": data / "train",
        "data.validation": data / "validation",
        "data.tokenizer": data / "tokenizer.model",
    }
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    script = [str(ROOT / "launch/pretrain.py"), "--config", str(ROOT / "configs/experiment/quickstart.yaml")]
    return [*launcher, "--log_level", "error", *script, *(f"{key}={value}" for key, value in keys.items())]


if __name__ == "__main__":
    run_command(main)
