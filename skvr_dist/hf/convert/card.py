"""The model card: what the weights are, how they were trained, how to load them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.model import ModelConfig
from skvr_dist.evaluate.cache_plan import profiles_of
from skvr_dist.evaluate.intervals import Interval
from skvr_dist.evaluate.retention import RETENTION_FILE, RetentionPoint, as_table
from skvr_dist.routing import POLICIES, CacheStrategy, RoutingConfig, parameters_in_words
from skvr_dist.schedule import in_words

# What a checkpoint's facts hold that a reader of the card wants to know.
_FACTS = ("step", "tokens_seen", "imported_from", "dequantized_from")
_TRAINING = ("global_batch_size", "learning_rate", "weight_decay", "precision")


@dataclass(frozen=True)
class Training:
    """What the card tells about the training."""

    routing: RoutingConfig
    facts: Mapping[str, object]
    """Rows of the table of facts, such as the step."""
    retention_table: str | None = None
    """Quality at several cache strategies, in Markdown, if it was measured."""
    profiles: Mapping[str, str] = field(default_factory=dict)
    """Named cache strategies."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Training:
        """Collect it from a checkpoint, with what `tools/retention.py` and `tools/plan_cache.py` left in it."""
        config = checkpoint.config
        facts = {name: value for name, value in checkpoint.facts.record().items() if name in _FACTS}
        if checkpoint.facts.averaged:
            facts["averaged"] = f"weights of the steps {', '.join(map(str, checkpoint.facts.averaged.steps))}"
        facts |= config.data.model_dump(exclude={"validation"}, exclude_none=True)
        training = {name: getattr(config.train, name) for name in _TRAINING}
        facts |= {name: in_words(value) for name, value in training.items() if value is not None}
        table = None
        measured = checkpoint.folder / RETENTION_FILE
        if measured.exists():
            record = json.loads(measured.read_text())
            points = [_measured(point) for point in record["points"]]
            table = as_table({f"step {checkpoint.step}": points})
            length = record.get("sequence_length", config.data.sequence_length)  # earlier releases left it out
            table += f"\n\nOver {record['sequences']} held-out sequences of {length} tokens."
        return cls(config.routing, facts, table, profiles_of(checkpoint.folder, config.evaluate.profiles))


def _measured(point: dict[str, Any]) -> RetentionPoint:
    """A point of a curve; JSON has null for what is no number."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    rise = Interval(*map(number, point["rise"])) if point.get("rise") else None  # earlier releases left it out
    return RetentionPoint(**{**point, "loss": number(point["loss"]), "rise": rise})


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    training: Training,
    tokenizer_file: Path | None,
    pruned_to: CacheStrategy | None,
) -> str:
    """The text of README.md, for any policy that `export_model` takes.

    Args:
        name: the folder's name, as the title and in the example.
        tokenizer_file: as for `export_model`.
        pruned_to: the one strategy that was kept, if not all.
    """
    header = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["stochastic-kv-routing"])
    routing = {"policy": training.routing.policy, **parameters_in_words(training.routing)}
    facts = {"parameters": f"{parameters:,}", "layers": config.num_hidden_layers, **routing, **training.facts}
    table = tabulate(facts.items(), headers=["fact", "value"], tablefmt="github", disable_numparse=True)
    introduction = f"{_origin(config, training)}\n\n{_retention(pruned_to)}"
    sections = [f"---\n{header.to_yaml()}\n---", f"# {name}", introduction, f"## Training\n\n{table}"]
    if training.retention_table:
        sections.append(f"## Quality by retention\n\nHeld-out loss in nats per token.\n\n{training.retention_table}")
    sections.append(f"## Loading\n\n{_example(name, tokenizer_file, pruned_to is not None)}")
    if pruned_to is None:
        sections.append(f"## A smaller cache\n\n{_smaller_cache(name, training)}")
    return "\n\n".join(sections) + "\n"


def _origin(config: ModelConfig, training: Training) -> str:
    quantization = training.facts.get("dequantized_from")
    lossy = f" Its training began with weights dequantized from {quantization}, which had lost precision before."
    if training.facts.get("step") == 0:
        lossy = f" Its weights were dequantized from {quantization}: they have no more precision than those had."
    return _trained(config, training.routing) + (lossy if quantization else "")


def _trained(config: ModelConfig, routing: RoutingConfig) -> str:
    if routing.policy == "none":
        return f"A {config.architecture} decoder, trained without stochastic KV routing."
    policy = POLICIES[routing.policy]
    drawn = ", drawn anew for each micro-batch" if policy.is_random else ""
    return (
        f"A {config.architecture} decoder, trained with stochastic KV routing (random cross-layer attention, "
        f"[arXiv 2604.22782](https://arxiv.org/abs/2604.22782)) under the policy `{policy.name}`: instead of its "
        f"own keys and values, {policy.words}{drawn}."
    )


def _retention(pruned_to: CacheStrategy | None) -> str:
    if pruned_to is not None:
        return (
            f"This export is **pruned**: layers {', '.join(map(str, pruned_to.retained))} of {pruned_to.num_layers} "
            f"keep a key/value cache; the others read the nearest of them before, without projections of their own."
        )
    return (
        "This export is at **full retention**: every layer keeps its own key/value cache, as in any model of the "
        "family, and nothing but transformers is needed. It holds the key and value projections of every layer, so "
        "the same weights also serve strategies that cache only some of the layers."
    )


def _smaller_cache(name: str, training: Training) -> str:
    profiles = "".join(f"\n* `{profile}`: {spec}" for profile, spec in training.profiles.items())
    known = f"\n\nProfiles of this model:\n{profiles}" if profiles else ""
    profile = next(iter(training.profiles), "every:2")
    return f"""A **strategy** is the set of layers that keep a cache: `every:G` (every G-th layer), `prefix:M` (the
first M), or a list that begins with 0. The code for it is beside the weights:

```python
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", trust_remote_code=True, kv_profile="{profile}")
model.set_cache_strategy("every:4")  # at any time, from the next prompt on
```{known}"""


def _example(name: str, tokenizer_file: Path | None, needs_code: bool) -> str:
    trust = ", trust_remote_code=True" if needs_code else ""
    model = f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{trust})'
    if tokenizer_file is None:
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\n{model}\n```\n\nNo tokenizer is included."
    code = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{model}
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("def main():", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```"""
    if tokenizer_file.suffix != ".model":
        return f"{code}\n\nThe tokenizer is that of the checkpoint that was imported."
    return f"""{code}

The tokenizer adds no token to a text, as in training. Each document of the training data ended with
`tokenizer.eos_token`, which is also what a new document is generated from. Names of special tokens within a text are
read as text; `tokenizer(text, split_special_tokens=False)` makes tokens of them."""
