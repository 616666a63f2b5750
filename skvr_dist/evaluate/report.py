"""The comparison of a standard and a routed model of the same shape: one page and one picture.

Both are runs on the same tokens; or one is an imported checkpoint, such as the one that the other run started from.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.held_out import held_out_batches
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.curve import HeldOutData, Measurement, evaluate_checkpoint, require_losses
from skvr_dist.evaluate.generate import cache_bytes, generate
from skvr_dist.evaluate.retention import RetentionPoint, as_records, as_table, percent, plot
from skvr_dist.files import as_json, write_whole
from skvr_dist.routing import CacheStrategy, parameters_in_words
from skvr_dist.run.folder import RunFolder

PICTURE, REPORT, RECORD = "retention.png", "report.md", "report.json"
_PROMPT_TOKENS, _NEW_TOKENS, _TEMPERATURE = 128, 96, 0.7
_SAMPLE_STRATEGIES = ("full", "every:2")


@dataclass(frozen=True)
class RunSummary:
    """One side of the comparison."""

    label: str
    checkpoint: Checkpoint
    measurement: Measurement
    tokens_per_second: float | None
    """Median over the steps; None, like the two below, if no steps were logged, as for an import."""
    skipped_kv_share: float | None
    """Mean over the steps."""
    crossing_bytes_per_step: float | None
    """Mean over the steps, all boundaries together."""

    @classmethod
    def of(cls, label: str, run: Path, measurement: Measurement) -> RunSummary:
        """Summarise a run (or an import) from its latest checkpoint and its metrics."""
        checkpoint = Checkpoint(run)
        steps = _training_records(run, checkpoint)
        crossing = [sum(v for tag, v in r.items() if tag.startswith("pipeline/crossing_bytes")) for r in steps]
        return cls(
            label=label,
            checkpoint=checkpoint,
            measurement=measurement,
            tokens_per_second=statistics.median(r["train/tokens_per_second"] for r in steps) if steps else None,
            skipped_kv_share=statistics.mean(r["routing/skipped_kv_share"] for r in steps) if steps else None,
            crossing_bytes_per_step=statistics.mean(crossing) if steps else None,
        )

    @property
    def curve(self) -> list[RetentionPoint]:
        """The retention curve."""
        return self.measurement.points

    @property
    def routing(self) -> str:
        """The policy and its parameters, in words."""
        routing = self.checkpoint.config.routing
        return " ".join([routing.policy, *(f"{name} {value}" for name, value in parameters_in_words(routing).items())])


def write_report(
    standard: Path,
    routed: Path,
    output: Path,
    *,
    strategies: Sequence[str],
    sequences: int | None = None,
    prompt: str | None = None,
    data: str | None = None,
    sequence_length: int | None = None,
) -> Path:
    """Evaluate the latest checkpoints of two runs and write report.md, report.json and retention.png to `output`.

    Args:
        strategies: the first one is the reference that the others are compared with.
        sequences: held-out sequences, as `HeldOutData.batches` takes them.
        prompt: the text that is continued; None takes the beginning of the held-out data.
        data, sequence_length: as for `HeldOutData.of`; None takes those of the first run that has its own.

    Returns:
        the path of report.md.

    Raises:
        UserError: the runs are not of the same model after the same number of tokens, there is no held-out data, or the
            prompt is no text that fits.
    """
    folders = {"standard": standard, "routed": routed}
    checkpoints = {label: Checkpoint(run) for label, run in folders.items()}
    _require_comparable(*checkpoints.values())
    trained = [checkpoint for checkpoint in checkpoints.values() if checkpoint.is_trained]
    held_out = HeldOutData.of([*trained, *checkpoints.values()][0], data, sequence_length)
    tokenizer = _tokenizer(list(checkpoints.values()))
    longest = checkpoints["standard"].model_config.max_position_embeddings
    new_tokens = min(_NEW_TOKENS, longest // 2)
    start = _prompt(prompt, tokenizer, held_out, longest - new_tokens, new_tokens)
    runs = [
        RunSummary.of(
            label,
            folders[label],
            evaluate_checkpoint(checkpoint, held_out, strategies, sequences=sequences),
        )
        for label, checkpoint in checkpoints.items()
    ]
    for run in runs:
        require_losses(run.checkpoint, {point.strategy: point.loss for point in run.curve})
    samples = [sample for run in runs for sample in _samples(run, tokenizer, start, new_tokens)]
    output.mkdir(parents=True, exist_ok=True)
    plot({run.label: run.curve for run in runs}, output / PICTURE)
    write_whole(output / RECORD, as_json(_record(runs, samples), indent=2) + "\n")
    write_whole(output / REPORT, _markdown(runs, samples))
    return output / REPORT


def _record(runs: Sequence[RunSummary], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of report.json."""
    measured = runs[0].measurement.record()
    del measured["points"]
    return {
        "measured": measured,
        "runs": {
            run.label: {
                "routing": run.checkpoint.config.routing.model_dump(),
                "step": run.checkpoint.step,
                "tokens_seen": run.checkpoint.facts.tokens_seen,
                "tokens_per_second": run.tokens_per_second,
                "skipped_kv_share": run.skipped_kv_share,
                "crossing_bytes_per_step": run.crossing_bytes_per_step,
                "curve": as_records(run.curve),
            }
            for run in runs
        },
        "samples": samples,
    }


def _training_records(run: Path, checkpoint: Checkpoint) -> list[dict[str, float]]:
    """What a run logged of its steps; nothing for an import.

    Raises:
        UserError: a run of ours logged none here.
    """
    folder = RunFolder(run)
    steps = [record for record in folder.metric_records() if "train/loss" in record]
    if checkpoint.is_trained and not steps:
        raise UserError(f"{folder.metrics} logs no step, and the report compares speeds; give the folder of a run")
    return steps


def _require_comparable(a: Checkpoint, b: Checkpoint) -> None:
    shapes = [checkpoint.model_config.model_dump(exclude={"attention"}) for checkpoint in (a, b)]  # but for the kernel
    if shapes[0] != shapes[1]:
        raise UserError(f"{a.folder} and {b.folder} are of different models; compare runs with the same model section")
    if not (a.is_trained and b.is_trained):
        return
    for fact in ("step", "tokens_seen", "data_fingerprint"):
        theirs, others = getattr(a.facts, fact), getattr(b.facts, fact)
        if theirs != others:
            raise UserError(f"{a.folder} has {fact} {theirs}, {b.folder} {others}; compare runs on the same tokens")


def _tokenizer(checkpoints: Sequence[Checkpoint]) -> Tokenizer:
    """The tokenizer of the first checkpoint that has one; `HeldOutData.require_fits` compares it with the data's."""
    files = [file for checkpoint in checkpoints if (file := checkpoint.tokenizer_file)]
    if not files:
        raise UserError(
            f"{' and '.join(str(checkpoint.folder) for checkpoint in checkpoints)} have no tokenizer to continue a "
            f"text with; compare checkpoints that have one"
        )
    return load_tokenizer(files[0])


def _prompt(text: str | None, tokenizer: Tokenizer, held_out: HeldOutData, most: int, new_tokens: int) -> torch.Tensor:
    """The tokens to continue [S]: of a text, or the beginning of the held-out data.

    Args:
        most: tokens that leave room for the `new_tokens` in the model's longest sequence.

    Raises:
        UserError: the text is none, is empty, or leaves no room.
    """
    if text is None:
        length = min(_PROMPT_TOKENS, most)
        first = held_out_batches(
            held_out.sets[:1],
            sequence_length=length,
            sequences=1,
            batch_size=1,
            separate_documents=held_out.separate_documents,
        )
        return first[0].tokens[0, :length]
    if not text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"--prompt {text!r} holds no text to continue; give one in UTF-8, or leave it out")
    tokens = tokenizer.encode(text)
    if len(tokens) > most:
        raise UserError(
            f"--prompt has {len(tokens)} tokens, and {new_tokens} follow, but the model reads at most "
            f"{most + new_tokens}; give a shorter one"
        )
    return torch.tensor(tokens)


def _samples(run: RunSummary, tokenizer: Tokenizer, prompt: torch.Tensor, new_tokens: int) -> list[dict[str, Any]]:
    """Continuations of a prompt [S] at several strategies, with the size of the cache that was measured."""
    checkpoint = run.checkpoint
    decoder = checkpoint.load_decoder()
    samples = []
    for spec in _SAMPLE_STRATEGIES:
        strategy = CacheStrategy.parse(spec, checkpoint.model_config.num_hidden_layers)
        tokens, cache = generate(
            decoder,
            prompt,
            strategy,
            max_new_tokens=new_tokens,
            temperature=_TEMPERATURE,
            stop_tokens=[tokenizer.eos_id],
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
    smallest = min(range(len(standard.curve)), key=lambda i: standard.curve[i].retention)
    rise = [run.curve[smallest].loss - run.curve[0].loss for run in runs]
    speeds = tabulate(
        [
            [
                run.label,
                run.routing,
                _or_none(run.tokens_per_second, ",.0f"),
                _or_none(run.skipped_kv_share, ".0%"),
                _or_none(run.crossing_bytes_per_step, ".2f", 1e-6),
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
        f"{_introduction(runs)} Then both were run with "
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


def _introduction(runs: Sequence[RunSummary]) -> str:
    standard = runs[0].checkpoint
    layers, tokens = standard.model_config.num_hidden_layers, standard.facts.tokens_seen
    if all(run.checkpoint.is_trained for run in runs):
        return (
            f"The same {layers}-layer decoder, trained twice on the same {tokens:,} tokens: once as usual, once with "
            f"stochastic KV routing."
        )
    return f"Two {layers}-layer decoders of the same shape: {'; '.join(_story(run) for run in runs)}."


def _story(run: RunSummary) -> str:
    facts = run.checkpoint.facts
    imported = f"imported from {facts.imported_from}" if facts.imported_from else "drawn"
    trained = f"then trained here on {facts.tokens_seen:,} tokens" if run.checkpoint.is_trained else ""
    return f"`{run.label}` was {', '.join(part for part in (imported, trained) if part)}"


def _or_none(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value * unit, form)


def _fenced(title: str, text: str) -> list[str]:
    return [f"**{title}**", "", "````text", text, "````", ""]
