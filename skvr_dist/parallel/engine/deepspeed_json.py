"""The DeepSpeed configuration of a run, generated from ours; and whether DeepSpeed takes what is passed through."""

from __future__ import annotations

import contextlib
import difflib
import logging
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from skvr_dist.config.layouts import data_parallel_size, zero_stage_in_use
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.section import dotted


def deepspeed_json(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of this run."""
    replicas = data_parallel_size(config, world_size)
    generated: dict[str, Any] = {
        # DeepSpeed counts passes: a micro-batch that is distilled has several.
        "train_batch_size": config.num_passes * config.train.micro_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_passes // replicas,
        "gradient_clipping": config.train.gradient_clipping,
        "zero_optimization": {"stage": zero_stage_in_use(config, replicas)},
        "bf16": {
            "enabled": config.train.precision == "bf16",
            # The guard has found the gradient finite before; DeepSpeed would wait for the device to look again.
            "check_grad_overflow": False,
            # With ZeRO-1 each gradient goes to its fp32 sum as it comes: none is kept, added up or zeroed in bf16.
            "immediate_grad_update": True,
        },
    }
    if config.train.precision == "bf16":
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    # DeepSpeed prints nothing of its own unless its timers are asked for.
    profiler = config.deepspeed.get("flops_profiler")
    timed = config.deepspeed.get("wall_clock_breakdown", False)
    timed = timed or (isinstance(profiler, Mapping) and profiler.get("enabled", False))  # which asks for them too
    defaults: dict[str, Any] = {
        "steps_per_print": config.train.log_every_steps if timed else None,
        # With offload too the optimizer is torch's AdamW; DeepSpeed's own is compiled when a run starts.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # What was accumulated in fp32 is reduced in fp32; DeepSpeed would round it to bf16 on the way.
        defaults["communication_data_type"] = "fp32"
    passed = {**defaults, **config.deepspeed}
    zero = {**passed.pop("zero_optimization", {}), **generated.pop("zero_optimization")}
    return {**passed, **generated, "zero_optimization": zero}


@contextlib.contextmanager
def naming_refused_options(given: Mapping[str, Any]) -> Iterator[None]:
    """Say in a sentence that DeepSpeed refuses options when an engine is made, which it has read without complaint.

    Args:
        given: the `deepspeed` section.
    """
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        import deepspeed

        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not given or Path(deepspeed.__file__).parent not in raised_in.parents:
            raise
        options = ", ".join(f"deepspeed.{key} {value!r}" for key, value in given.items())
        raise UserError(
            f"DeepSpeed cannot train with {options} ({' '.join(str(error).split())}); change that, or leave it out"
        ) from error


def require_accepted(config: Config, world_size: int) -> None:
    """Have DeepSpeed itself read the configuration, before any process group exists.

    What it does not say of its own accord follows from watching it read: a key that it never asks for is unknown, and a
    value of another kind than its default is wrong.

    Raises:
        UserError: names the option of the `deepspeed` section, and the nearest known one.
    """
    if not config.deepspeed:
        return
    options = deepspeed_json(config, world_size)
    # Without a process group DeepSpeed takes the world for one rank.
    options["train_batch_size"] = options["train_micro_batch_size_per_gpu"] * options["gradient_accumulation_steps"]
    watched = _Watched(options)
    try:
        _let_deepspeed_read(watched)
    except ValidationError as error:
        raise UserError("; ".join(_sentences(error, options))) from None
    except Exception as error:  # assertions, and what follows from a value of a type that nobody checked
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        culprits = [f"deepspeed.{key} {options[key]!r}" for key in config.deepspeed if _is_refused(options, key)]
        raise UserError(
            f"DeepSpeed cannot read {' and '.join(culprits) or 'the deepspeed section'} ({reason}); compare it with "
            f"DeepSpeed's documentation"
        ) from None
    wrong = list(watched.complaints("deepspeed"))
    if wrong:
        raise UserError("; ".join(wrong))


def _let_deepspeed_read(options: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    logging.disable(logging.INFO)
    try:
        DeepSpeedConfig(options)
    finally:
        logging.disable(logging.NOTSET)


def _is_refused(options: Mapping[str, Any], key: str) -> bool:
    """Whether the configuration can be read without that key, which then is the one to blame."""
    try:
        _let_deepspeed_read({name: value for name, value in options.items() if name != key})
    except Exception:
        return False
    return True


class _Watched(dict[str, Any]):
    """Options that remember what was asked of them, and with which defaults."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({key: _Watched(value) if isinstance(value, dict) else value for key, value in options.items()})
        self.asked: dict[str, Any] = {}
        self.taken_whole = False
        """By one of DeepSpeed's models, which refuses what it does not know."""

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        self.taken_whole = True
        return super().keys()

    def __iter__(self) -> Iterator[str]:  # `**options` asks for keys only if this is not dict's own
        return super().__iter__()

    def __copy__(self) -> _Watched:
        return self

    def complaints(self, path: str) -> Iterator[str]:
        """Keys that nobody asked for, and values of another kind than the default."""
        for key, value in self.items():
            if key not in self.asked:
                near = difflib.get_close_matches(key, self.asked, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(self.asked))}"
                yield f"unknown key {path}.{dotted([key])}; {hint}"
            elif isinstance(value, _Watched):
                if value.asked and not value.taken_whole:  # else a model has taken it in its own way
                    yield from value.complaints(f"{path}.{key}")
            elif not _is_alike(value, self.asked[key]):
                yield f"{path}.{key} is {value!r}; give a value like DeepSpeed's default {self.asked[key]!r}"


def _is_alike(value: Any, default: Any) -> bool:
    if value is None or default is None:
        return True
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))


def _sentences(error: ValidationError, options: Mapping[str, Any]) -> Iterator[str]:
    """One for each mistake that one of DeepSpeed's models has found; it names itself, but not where it was."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = {model.__name__: model for model in _descendants(DeepSpeedConfigModel)}
    known = list(models[error.title].model_fields) if error.title in models else []
    for item in error.errors():
        if not item["loc"]:  # of a whole model, which names its options itself
            yield f"deepspeed: {item['msg']}"
            continue
        name = str(item["loc"][0])
        sections = [key for key, value in options.items() if isinstance(value, Mapping) and name in value]
        path = dotted(["deepspeed", *sections[:1], *item["loc"]])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1)
            yield f"unknown key {path}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
        else:
            yield f"{path} is {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _descendants(model: Any) -> Iterator[Any]:
    for each in model.__subclasses__():
        yield each
        yield from _descendants(each)
