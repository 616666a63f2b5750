"""The comparison of a standard and a routed run of the same model on the same tokens: one page and one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.reader import validation_sequences
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.checkpoints import evaluate_checkpoint
from skvr_dist.evaluate.generate import cache_bytes, generate
from skvr_dist.evaluate.retention import RetentionPoint, as_records, as_table, percent, plot
from skvr_dist.routing import CacheStrategy

PICTURE, REPORT, RECORD = "retention.png", "report.md", "report.json"
_PROMPT_TOKENS, _NEW_TOKENS, _TEMPERATURE = 128, 96, 0.7
_SAMPLE_STRATEGIES = ("full", "every:2")


@dataclass(frozen=True)
class RunSummary:
    """One side of the comparison."""

    label: str
    checkpoint: Checkpoint
    curve: list[RetentionPoint]
    tokens_per_second: float
    """Median over the steps."""
    skipped_kv_share: float
    """Mean over the steps."""
    crossing_bytes_per_step: float
    """Mean over the steps, all boundaries together."""

    @classmethod
    def of(cls, label: str, run: Path, strategies: Sequence[str], sequences: int) -> RunSummary:
        checkpoint = Checkpoint(run)
        steps = _training_records(run)
        crossing = [sum(v for tag, v in r.items() if tag.startswith("pipeline/crossing_bytes")) for r in steps]
        return cls(
            label=label,
            checkpoint=checkpoint,
            curve=evaluate_checkpoint(checkpoint, strategies, sequences=sequences),
            tokens_per_second=statistics.median(r["train/tokens_per_second"] for r in steps),
            skipped_kv_share=statistics.mean(r["routing/skipped_kv_share"] for r in steps),
            crossing_bytes_per_step=statistics.mean(crossing),
        )

    @property
    def routing(self) -> str:
        routing = self.checkpoint.facts["routing"]
        return " ".join([routing["policy"], *(f"{k} {v}" for k, v in routing.items() if k != "policy" and v)])


def write_report(
    standard: Path, routed: Path, output: Path, *, strategies: Sequence[str], sequences: int, prompt: str | None = None
) -> Path:
    """Evaluate the latest checkpoints of two runs and write report.md, report.json and retention.png to `output`.

    Args:
        strategies: the first one is the reference that the others are compared with.
        sequences: held-out sequences.
        prompt: the text that is continued; None takes the beginning of the held-out data.

    Returns:
        the path of report.md.

    Raises:
        UserError: the runs are not of the same model after the same number of tokens.
    """
    runs = [
        RunSummary.of(name, run, strategies, sequences) for name, run in (("standard", standard), ("routed", routed))
    ]
    _require_comparable(*(run.checkpoint for run in runs))
    samples = [sample for run in runs for sample in _samples(run, prompt)]
    output.mkdir(parents=True, exist_ok=True)
    plot({run.label: run.curve for run in runs}, output / PICTURE)
    record = {
        "runs": {
            run.label: {
                "routing": run.checkpoint.facts["routing"],
                "step": run.checkpoint.step,
                "tokens_seen": run.checkpoint.facts["tokens_seen"],
                "tokens_per_second": run.tokens_per_second,
                "skipped_kv_share": run.skipped_kv_share,
                "crossing_bytes_per_step": run.crossing_bytes_per_step,
                "curve": as_records(run.curve),
            }
            for run in runs
        },
        "samples": samples,
    }
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (output / REPORT).write_text(_markdown(runs, samples), encoding="utf-8")
    return output / REPORT


def _training_records(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def _require_comparable(a: Checkpoint, b: Checkpoint) -> None:
    if a.model_config != b.model_config:
        raise UserError(f"{a.folder} and {b.folder} are of different models; compare runs with the same model section")
    for fact in ("step", "tokens_seen", "data_fingerprint"):
        if a.facts[fact] != b.facts[fact]:
            raise UserError(
                f"{a.folder} has {fact} {a.facts[fact]}, {b.folder} {b.facts[fact]}; compare runs on the same tokens"
            )


def _samples(run: RunSummary, text: str | None) -> list[dict[str, Any]]:
    """Continuations of one text at several strategies, with the size of the cache that was measured."""
    checkpoint = run.checkpoint
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file)
    if text is None:
        dataset = Dataset.open(checkpoint.config_tree["data"]["validation"])
        prompt = validation_sequences(dataset, sequence_length=_PROMPT_TOKENS, num_sequences=1)[0, :-1]
    else:
        prompt = torch.tensor(tokenizer.encode(text))
    decoder = checkpoint.load_decoder()
    samples = []
    for spec in _SAMPLE_STRATEGIES:
        strategy = CacheStrategy.parse(spec, checkpoint.model_config.num_hidden_layers)
        tokens, cache = generate(
            decoder, prompt, strategy, max_new_tokens=_NEW_TOKENS, temperature=_TEMPERATURE, stop_token=tokenizer.eos_id
        )
        samples.append(
            {
                "run": run.label,
                "strategy": spec,
                "retention": strategy.retention,
                "cache_bytes": cache_bytes(cache),
                "prompt": tokenizer.decode(prompt.tolist()),
                "tokens": tokens.tolist(),
                "continuation": tokenizer.decode(tokens.tolist()),
            }
        )
    return samples


def _markdown(runs: Sequence[RunSummary], samples: Sequence[dict[str, Any]]) -> str:
    standard = runs[0]
    facts = standard.checkpoint.facts
    smallest = min(range(len(standard.curve)), key=lambda i: standard.curve[i].retention)
    rise = [run.curve[smallest].loss - run.curve[0].loss for run in runs]
    speeds = tabulate(
        [
            [
                run.label,
                run.routing,
                f"{run.tokens_per_second:,.0f}",
                f"{run.skipped_kv_share:.0%}",
                f"{run.crossing_bytes_per_step / 1e6:.2f}",
            ]
            for run in runs
        ],
        headers=["run", "routing", "tokens/s", "K/V projections skipped", "MB across boundaries per step"],
        tablefmt="github",
        disable_numparse=True,
    )
    lines = [
        "# One set of weights, any cache budget",
        "",
        f"The same {standard.checkpoint.model_config.num_hidden_layers}-layer decoder, trained twice on the same "
        f"{facts['tokens_seen']:,} tokens: once as usual, once with stochastic KV routing. Then both were run with "
        f"fewer and fewer layers keeping a key/value cache; the others read the nearest retained layer below.",
        "",
        f"With {percent(standard.curve[smallest].retention)} of the cache, the loss of the standard model changes by "
        f"**{rise[0]:+.2f}** nats per token, that of the routed one by **{rise[1]:+.2f}**.",
        "",
        f"![Held-out loss against cache bytes per token]({PICTURE})",
        "",
        as_table({run.label: run.curve for run in runs}),
        "",
        speeds,
        "",
        "## Continuations",
        "",
        f"Sampled at temperature {_TEMPERATURE} with one seed, with a cache that holds only the retained layers.",
        "",
        *_fenced("The prompt", samples[0]["prompt"]),
    ]
    for sample in samples:
        title = f"{sample['run']}, {percent(sample['retention'])} retention ({sample['cache_bytes']:,} bytes of cache)"
        lines += _fenced(title, sample["continuation"])
    return "\n".join(lines)


def _fenced(title: str, text: str) -> list[str]:
    return [f"**{title}**", "", "````text", text, "````", ""]
