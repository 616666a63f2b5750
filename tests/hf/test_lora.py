"""LoRA through PEFT on an exported model: train with random donors, save, load, merge, decode with a small cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.hf_models import random_weights, shape_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import export_model
from skvr_dist.hf.model.rcla import disable_rcla, enable_rcla
from skvr_dist.routing import RoutingConfig

CONFIG = shape_of("qwen3")
RETAINED = (0, 2, 4, 6)


def export(folder: Path) -> Path:
    weights = random_weights(CONFIG, scale=0.1)
    training = Training(RoutingConfig(policy="none"), {"step": 1}, profiles={"half": "every:2"})
    export_model(CONFIG, weights, weights.__getitem__, None, folder, training=training, dtype=torch.float32)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def texts() -> Tensor:
    """int [4, 12], texts that are learned by heart."""
    return torch.randint(1, 101, (4, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def loss_of(model: Any, strategy: str) -> float:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_cache_strategy(strategy)
    return model.eval()(input_ids=texts(), labels=texts()).loss.item()


def test_trained_saved_merged_and_decoded(tmp_path: Path) -> None:
    base = load(export(tmp_path / "export"))
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    losses = {name: loss_of(base, name) for name in ("full", "half")}
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    model: Any = get_peft_model(base, settings)
    base.set_cache_strategy("full")
    enable_rcla(model, cross_layer_prob=0.5, policy="strategy", seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(25):
        model(input_ids=texts(), labels=texts()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    disable_rcla(model)
    after = {name: loss_of(model, name) for name in losses}
    assert all(after[name] < 0.9 * losses[name] for name in losses), (losses, after)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not any("embed_tokens" in file.name for file in (tmp_path / "adapter").iterdir())

    # The adapter alone, on the export as it was.
    again = PeftModel.from_pretrained(load(tmp_path / "export"), tmp_path / "adapter")
    assert {name: loss_of(again, name) for name in after} == after
    stem = "base_model.model."
    kept = {name.removeprefix(stem).replace(".base_layer", ""): p for name, p in again.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())

    # Merged into it: a checkpoint like any other, with its code and its profiles.
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged", kv_profile="half")
    assert merged.retained_layers == RETAINED
    assert abs(loss_of(merged, "half") - after["half"]) < 1e-4
    prompts = texts()[:, :4]
    ended: Any = merged.generate(
        prompts, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, use_cache=True
    )
    held = [layer for layer in ended.past_key_values.layers if getattr(layer, "keys", None) is not None]
    assert len([layer for layer in held if layer.keys.numel()]) == len(RETAINED)
    model.get_base_model().set_cache_strategy("half")
    assert torch.equal(
        ended.sequences, model.generate(input_ids=prompts, max_new_tokens=6, do_sample=False, pad_token_id=0)
    )
