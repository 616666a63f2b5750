"""Putting today's code into an earlier export, for a version of transformers that the export's own does not know."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from skvr_dist.errors import UserError
from skvr_dist.files import PARTIAL_SUFFIX, full_disk, naming_failure, naming_full_disk, prove_folder
from skvr_dist.hf.convert.bundle import CODE_FILES, add_code, servable
from skvr_dist.hf.convert.check import ATTENTION, DECODED_TOKENS, DECODING_TOLERANCE, TOLERANCE
from skvr_dist.hf.convert.weight_files import weight_files
from skvr_dist.hf.model.causal_lm import decoding_error

_TOKENS = 16


@dataclass(frozen=True)
class CodeUpdate:
    """What the comparison of an export's old and new code found; the strategies are named as one would ask for them."""

    changed_files: tuple[str, ...]
    """Code files that are not what they were."""
    differing_weights: tuple[str, ...]
    """Weights that the new code does not load bit for bit as they are stored."""
    changed_strategies: tuple[str, ...]
    """Strategies at which old and new code retain different layers."""
    logit_differences: dict[str, float]
    """Largest logit difference between old and new code without a cache, as a share of the largest logit, by strategy;
    empty if `old_fault`."""
    decoding_errors: dict[str, float]
    """Logit differences between greedy decoding with a cache and without one, both by the new code, as a share of the
    largest logit, by strategy."""
    old_fault: str | None
    """Why the old code does not run with the installed transformers, if it does not."""

    def failures(self) -> list[str]:
        """One sentence per figure that was missed."""
        found = [f"weight {name} is not what is stored" for name in self.differing_weights[:1]]
        found += [f"strategy {name} retains other layers than before" for name in self.changed_strategies]
        for what, errors, accepted in (
            ("without a cache", self.logit_differences, TOLERANCE),
            ("with a cache", self.decoding_errors, DECODING_TOLERANCE),
        ):
            found += [
                f"logits at strategy {name} {what} are off by {error:.3g} of the largest one; {accepted:.0e} is "
                f"accepted"
                for name, error in errors.items()
                if not error <= accepted
            ]
        return found


def update_code(folder: Path) -> CodeUpdate:
    """Replace the code inside an export by today's, if weights, strategies and logits stay what they are.

    Nothing but the code files is written, and those only if the comparison finds no failure. The model is held once
    in float32 by each of the two codes.

    Raises:
        UserError: the folder is no export of ours that brings code along, or cannot be written.
    """
    reference = _code_of(folder)
    prove_folder(folder)
    with naming_failure(folder):  # beside it, so that the renames stay within one file system
        prefix, beside = f"{folder.name[:64]}{PARTIAL_SUFFIX}-", folder.absolute().parent
        temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=beside)
    with temporary, naming_full_disk(folder):
        new = Path(temporary.name) / "new"  # transformers keeps code apart by the name of its folder
        new.mkdir()
        for file in folder.iterdir():
            if file.name not in CODE_FILES:
                (new / file.name).symlink_to(file.absolute())
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            add_code(new, config, reference.partition(".")[2])
            report = _compare(folder, new, reference)
        except (OSError, KeyError, ValueError, SafetensorError) as error:  # its own code refuses with ValueErrors
            if isinstance(error, UserError) or full_disk(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} cannot be loaded ({reason}); correct that, or export the checkpoint again"
            ) from None
        if not report.failures():
            with naming_failure(folder):
                for name in CODE_FILES:
                    (new / name).replace(folder / name)
    return report


def _code_of(folder: Path) -> str:
    """The class that the export's code loads as, such as modeling_skvr.Qwen3ForCausalLM."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        reference = str((stored.get("auto_map") or {}).get("AutoModelForCausalLM") or "")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is not an export: its config.json cannot be read ({error}); name an export"
        ) from None
    if not reference.startswith("modeling_skvr."):
        raise UserError(
            f"{folder}/config.json refers to {reference or 'no code'}, not to modeling_skvr; name an export that "
            f"tools/export_hf.py made"
        )
    return reference


def _compare(old: Path, new: Path, reference: str) -> CodeUpdate:
    changed = tuple(n for n in CODE_FILES if not (old / n).exists() or (old / n).read_text() != (new / n).read_text())
    model = _load(new, reference)
    loaded = model.state_dict()
    differing: list[str] = []
    for file in weight_files(old):
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            differing += [n for n in names if not torch.equal(loaded[n], stored.get_tensor(n).float())]
    strategies = _strategies(model)
    tokens = _tokens(model)
    retained, logits, decoding_errors = {}, {}, {}
    for name in strategies:
        model.set_cache_strategy(name)
        retained[name], logits[name] = model.retained_layers, _logits(model, tokens)
        decoding_errors[name] = decoding_error(model, tokens[:, : _TOKENS - DECODED_TOKENS], DECODED_TOKENS)
    del model, loaded

    changed_strategies: list[str] = []
    differences: dict[str, float] = {}
    fault = None
    try:
        model = _load(old, reference)
        for name in strategies:
            model.set_cache_strategy(name)
            if model.retained_layers != retained[name]:
                changed_strategies.append(name)
            difference = (_logits(model, tokens) - logits[name]).abs().max() / logits[name].abs().max()
            differences[name] = float(difference)
    except (ImportError, AttributeError, TypeError) as error:  # what it was written for has changed
        fault, differences = f"{type(error).__name__}: {error}", {}
    return CodeUpdate(changed, tuple(differing), tuple(changed_strategies), differences, decoding_errors, fault)


def _load(folder: Path, reference: str) -> Any:
    model_class = get_class_from_dynamic_module(reference, str(folder))
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)


def _strategies(model: Any) -> list[str]:
    """Strategies to compare: the default, full and half retention unless it is pruned, and the profiles it has."""
    layers = model.config.num_hidden_layers
    shares = len(model.retained_layers) < layers
    own = [",".join(map(str, model.retained_layers))] if shares else []
    pruned_to = getattr(model.config, "kv_pruned_to", None)
    whole = ["full", "every:2", f"prefix:{(layers + 1) // 2}"] if pruned_to is None else []
    profiles = servable(getattr(model.config, "kv_profiles", None) or {}, layers, pruned_to)
    return list(dict.fromkeys([*own, *whole, *profiles]))


def _tokens(model: Any) -> Tensor:
    """Random tokens, int [1, S]."""
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, model.config.max_position_embeddings)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits
