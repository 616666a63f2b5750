"""What is measured over the runtime that runs nothing: steps of published models, and their loss alone."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from skvr_dist.config.presets import find_configs
from skvr_dist.errors import UserError
from skvr_dist.lab.gpu_dry.library import DRIVER, RUNTIME

MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-8b")
SEQUENCE, MICRO_BATCHES = 4096, 2
_SECONDS = 900
_DEVICE_GIB = 1024
"""More than any GPU has, so that every model runs on one rank; the table says what it took."""
_TRUNCATED = 2000  # letters of what a process that failed has said


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    model: str
    part: Literal["engine", "decoder", "loss"] = "engine"
    """A step of the engine; the decoder in a plain loop, without head and loss; the loss alone."""
    routed: bool = False
    compiled: bool = False
    documents: bool = False
    """Whether positions attend within documents, four of each sequence."""
    zero_stage: int = 1

    @property
    def name(self) -> str:
        """The row in words."""
        if self.part == "loss":
            return f"{self.model}, loss"
        words = [self.model, self.part, self.routing, "compiled" if self.compiled else "eager"]
        words += ["documents"] * self.documents + [f"ZeRO-{self.zero_stage}"] * (self.zero_stage != 1)
        return ", ".join(words)

    @property
    def routing(self) -> str:
        """How layers read keys and values, in a word."""
        return "routed" if self.routed else "standard"

    @property
    def micro_batches(self) -> int:
        """Of the step that is measured."""
        return MICRO_BATCHES if self.part == "engine" else 1

    def asked(self, attention: str) -> dict[str, Any]:
        """What `skvr_dist.lab.gpu_dry.step` reads."""
        routing = {"policy": "uniform", "cross_layer_prob": 0.5} if self.routed else {"policy": "none"}
        return {
            "part": self.part,
            "config": {
                "model": _model_section(self.model) | {"attention": attention},
                "routing": routing,
                "parallel": {
                    "compile": "inductor" if self.compiled else "off",
                    "zero_stage": self.zero_stage,
                },
                "data": {
                    "train": "",
                    "validation": "",
                    "tokenizer": "",
                    "sequence_length": SEQUENCE,
                    "documents": "separate" if self.documents else "joined",
                },
                "train": {
                    "output_dir": "",
                    "steps": 10,
                    "global_batch_size": self.micro_batches,
                    "micro_batch_size": 1,
                    "precision": "bf16",
                    "learning_rate": 3e-4,
                },
            },
        }


def measurements() -> list[Measurement]:
    """All rows: models, standard and routed, eager and compiled; then what has a bound of its own."""
    ways = itertools.product(MODELS, (False, True), (False, True))
    steps = [Measurement(model, routed=routed, compiled=compiled) for model, compiled, routed in ways]
    others = [
        Measurement("qwen3-0.6b", routed=True, documents=True),
        Measurement("qwen3-0.6b", routed=True, compiled=True, documents=True),
        *(Measurement("qwen3-0.6b", routed=True, zero_stage=stage) for stage in (2, 3)),
    ]
    decoder = [Measurement("qwen3-1.7b", "decoder", routed, compiled=True) for routed in (False, True)]
    return [*steps, *others, *decoder, *(Measurement(model, "loss", compiled=True) for model in MODELS)]


def measure(rows: Iterable[Measurement], folder: Path, attention: str = "auto") -> Iterator[dict[str, Any]]:
    """The figures of each row, beside its name and fields.

    Args:
        folder: where `library.build` has built.
        attention: `model.attention` of all rows.

    Raises:
        UserError: a measurement failed.
    """
    for row in rows:
        yield {"row": row.name, **asdict(row), **_in_process_of_its_own(row, folder, attention)}


def _in_process_of_its_own(row: Measurement, folder: Path, attention: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as exchange:
        asked, found = Path(exchange) / "asked.json", Path(exchange) / "found.json"
        asked.write_text(json.dumps(row.asked(attention)))
        command = [sys.executable, "-m", "skvr_dist.lab.gpu_dry.step", str(asked), str(found)]
        try:
            said = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{row.name} has not ended in {_SECONDS} seconds; run it again when the machine has less to do"
            ) from None
        if not found.exists():
            raise failure(f"{row.name} ended with code {said.returncode} and no figures", said.stderr)
        return json.loads(found.read_text())


def failure(what: str, said: str) -> UserError:
    """That of a process, in its own sentence where it has refused what it was asked for.

    Args:
        said: what it has printed.
    """
    refusals = re.findall(rf"^{re.escape(UserError.__module__)}\.UserError: (.+)$", said, re.MULTILINE)
    if refusals:
        return UserError(refusals[-1])
    return UserError(f"{what}: {said.strip()[-_TRUNCATED:]}; is this PyTorch one of those in docs/gpu-dry.md?")


def environment(folder: Path) -> dict[str, str]:
    """That of a process on a machine with GPUs, as far as it can tell."""
    assert (folder / DRIVER).exists()
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "DS_ACCELERATOR": "cuda",
        "SKVR_GPU_DRY_GIB": str(_DEVICE_GIB),
    }


def _model_section(name: str) -> dict[str, Any]:
    import yaml

    (file,) = find_configs([name])
    return yaml.safe_load(Path(file).read_text(encoding="utf-8"))["model"]
