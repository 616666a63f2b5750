"""The finished runs in results.jsonl, as figures need them: several seeds of a run are one method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from skvr_dist.errors import UserError
from skvr_dist.files import require_file
from skvr_dist.routing.policies import POLICIES

_NEEDED = ("name", "seed", "state", "tokens", "held_out", "held_out_by_step", "retention", "config")
CACHE_BYTES_PER_ELEMENT = 2
"""Caches are counted in bf16, as they are served."""
# What may differ between sizes of one recipe, and between runs that are told apart by their names alone.
_NOT_RECIPE = ("model", "data", "parallel", "checkpoint", "evaluate", "deepspeed")
_NOT_RECIPE_OF_TRAIN = (
    "output_dir",
    "seed",
    "learning_rate",
    "resume",
    "initial_weights",
    "precision",
    "micro_batch_size",  # counts where donors are drawn for each micro-batch: `_sequences_per_draw`
)


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds alone."""

    label: str
    runs: tuple[Mapping[str, Any], ...]
    """Their lines of results.jsonl."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the first one."""
        found: Mapping[str, Any] = self.runs[0]["config"]
        return found

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config["model"]["num_hidden_layers"])

    @property
    def is_standard(self) -> bool:
        """Whether it was trained without routing."""
        return bool(self.config["routing"]["policy"] == "none")

    @property
    def strategies(self) -> list[str]:
        """The cache strategies that were measured, in the order of the configuration."""
        return list(self.runs[0]["retention"])

    def retention(self, strategy: str) -> float:
        """Share of the layers that keep a cache."""
        return float(self.runs[0]["retention"][strategy])

    def cache_bytes(self, strategy: str) -> int:
        """Of a token, in bf16."""
        model = self.config["model"]
        elements = 2 * model["num_key_value_heads"] * model["head_dim"]
        return round(self.retention(strategy) * self.layers) * elements * CACHE_BYTES_PER_ELEMENT

    def losses(self, strategy: str) -> list[float]:
        """At the end, one of each seed."""
        return [float(run["held_out"][strategy]) for run in self.runs]

    def losses_by_step(self, strategy: str) -> dict[int, list[float]]:
        """At every evaluation that gave all seeds a loss, by step."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for step, losses in run["held_out_by_step"]:
                if losses[strategy] is not None:  # which stands for no number
                    found.setdefault(int(step), []).append(float(losses[strategy]))
        return {step: losses for step, losses in sorted(found.items()) if len(losses) == len(self.runs)}

    def tokens_at(self, step: int) -> int:
        """Tokens seen up to a step: counted from the end, since a branch's trunk may have had other sequences."""
        per_step = int(self.config["train"]["global_batch_size"]) * int(self.config["data"]["sequence_length"])
        return int(self.runs[0]["tokens"]) - (int(self.config["train"]["steps"]) - step) * per_step

    @cached_property
    def parameters(self) -> int:
        """Of the model, embeddings included."""
        import torch

        from skvr_dist.config.model import ModelConfig
        from skvr_dist.model.decoder import Decoder

        model = ModelConfig.model_validate(self.config["model"])
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Decoder(model, 0, self.layers).parameters())

    @property
    def recipe(self) -> str:
        """Equal for methods that differ in the size of the model, in its learning rate and in names alone."""
        kept = {name: section for name, section in self.config.items() if name not in _NOT_RECIPE}
        train = {key: value for key, value in kept["train"].items() if key not in _NOT_RECIPE_OF_TRAIN}
        routing = {key: value for key, value in kept["routing"].items() if key != "draws_per"}
        routing["sequences_per_draw"] = self._sequences_per_draw
        return json.dumps({**kept, "train": train, "routing": routing}, sort_keys=True)

    @property
    def _sequences_per_draw(self) -> int | None:
        """Sequences that have their donors in common; None where none are drawn."""
        if not POLICIES[self.config["routing"]["policy"]].is_random:
            return None
        by_sequence = self.config["routing"].get("draws_per") == "sequence"
        return 1 if by_sequence else int(self.config["train"]["micro_batch_size"])


def read_methods(files: Sequence[Path]) -> tuple[list[Method], list[str]]:
    """The methods in some results, in their order, and sentences on the runs that are left out.

    Methods of different files with one name are told apart by the folder of the file, unless they are the same runs, as
    where two experiments have a run in common: then those of the first file are taken, and of the others only seeds
    that are new.

    Raises:
        UserError: a file cannot be read or is of another kind, or no run can be shown.
    """
    named: dict[str, dict[Path, list[Mapping[str, Any]]]] = {}
    unfinished, diverged = [], []
    for file in {file.resolve(): file.absolute() for file in files}.values():
        for line in _lines(file):
            if line["state"] != "finished" or not line["held_out"]:
                unfinished.append(str(line["name"]))
            elif None in line["held_out"].values():  # as JSON has it
                diverged.append(str(line["name"]))
            else:
                named.setdefault(_title(line), {}).setdefault(file, []).append(line)
    methods = []
    for title, by_file in named.items():
        kept: dict[Path, list[Mapping[str, Any]]] = {}
        for file, lines in by_file.items():
            same = next((others for others in kept.values() if _same_training(lines[0], others[0])), None)
            if same is None:
                kept[file] = lines
            else:
                seeds = {line["seed"] for line in same}
                same += [line for line in lines if line["seed"] not in seeds]
        for folder, lines in zip(_told_apart(list(kept)), kept.values(), strict=True):
            label = f"{folder}/{title}" if title and len(kept) > 1 else title or folder
            methods.append(Method(label, tuple(lines)))
    left_out = [f"Not finished, and left out: {', '.join(unfinished)}."] if unfinished else []
    left_out += [f"Left out, for a held-out loss that is no number: {', '.join(diverged)}."] if diverged else []
    if not methods:
        given = ", ".join(map(str, files))
        if diverged:
            raise UserError(f"{given}: the held-out loss of {', '.join(diverged)} is no number; give results of others")
        raise UserError(f"{given} holds no finished run that was evaluated; wait for one, or start the sweep again")
    return methods, left_out


def _title(line: Mapping[str, Any]) -> str:
    """The name of a run without its seed; empty where the experiment has nothing but seeds."""
    name, seed = str(line["name"]), f"seed-{line['seed']}"
    return "" if name == seed else name.removesuffix(f"_{seed}")


def _told_apart(files: Sequence[Path]) -> list[str]:
    """The last part of the folder of each file, or as many parts as tell them apart."""
    places = [file.parent for file in files]
    if len(set(places)) < len(places):
        places = list(files)
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _same_training(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs differ in seed, folder and evaluation at most."""

    def kept(line: Mapping[str, Any]) -> dict[str, Any]:
        sections = {name: dict(line["config"][name]) for name in ("model", "routing", "data", "train")}
        for key in ("output_dir", "seed"):
            sections["train"].pop(key, None)
        return {**sections, "strategies": list(line["retention"])}

    return kept(one) == kept(other)


def _lines(file: Path) -> list[Mapping[str, Any]]:
    try:
        require_file(file)
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            missing = [key for key in _NEEDED if key not in line]
        except (ValueError, TypeError):
            missing = ["JSON"]
        if missing:
            raise UserError(
                f"{file}, line {number} is no result of a sweep (it has no {', '.join(missing)}); give the "
                f"results.jsonl of an experiment"
            )
        lines.append(line)
    return lines
