"""What people give to the classes of transformers: sequences of any kind, empty prompts, and what is no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hf_models import edit_config, published, shape_of
from transformers import AutoConfig, AutoModelForCausalLM

from skvr_dist.errors import UserError
from skvr_dist.hf import disable_rcla, enable_rcla

LAYERS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As exports are: with a profile, at no strategy."""
    folder = tmp_path_factory.mktemp("saved")
    published(shape_of("llama", num_hidden_layers=LAYERS), folder)
    edit_config(kv_profiles={"half": "every:2"})(folder)
    return folder


@pytest.mark.parametrize(
    "sources",
    [
        torch.tensor([0, 0, 2, 2]),
        np.array([0, 0, 2, 2], dtype=np.int32),
        [np.int64(0), np.int64(0), np.int64(2), np.int64(2)],
        (0, 0, 2, 2),
    ],
    ids=["tensor", "array", "numpy numbers", "tuple"],
)
def test_sources_of_any_kind(sources: Any, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, kv_source_layers=sources)
    assert model.retained_layers == (0, 2)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["kv_source_layers"] == [0, 0, 2, 2]


@pytest.mark.parametrize("profile", [[0, 2], (0, 2), torch.tensor([0, 2]), "half"], ids=repr)
def test_a_profile_may_list_the_retained_layers(profile: Any, saved: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(saved, kv_profile=profile).retained_layers == (0, 2)
    config = AutoConfig.from_pretrained(saved)
    config.kv_profile = profile  # as the overrides of vLLM do
    assert AutoModelForCausalLM.from_config(config).retained_layers == (0, 2)


def test_a_range_is_full_retention(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, kv_source_layers=range(LAYERS))
    assert model.retained_layers == tuple(range(LAYERS))


@pytest.mark.parametrize("sources", [{None}, [0.0] * LAYERS, "0000", [True] * LAYERS, 5], ids=repr)
def test_what_is_no_list_of_layers_is_refused(sources: Any, saved: Path) -> None:
    with pytest.raises(UserError, match=r"^kv_source_layers .* must be a list of layer numbers, one for each of 4"):
        AutoModelForCausalLM.from_pretrained(saved, kv_source_layers=sources)


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({"kv_training": "uniform", "kv_profile": "half"}, r"^kv_training 'uniform' must say how routing was trained"),
        ({"kv_pruned_to": "abc"}, r"^kv_pruned_to 'abc' must be a list of layer numbers; export the checkpoint again"),
        ({"kv_profiles": {"half": "every:0"}}, r"^kv_profiles: half cannot be: .* needs a group of at least 1 layer"),
        ({"kv_profiles": ["half"], "kv_profile": "half"}, r"^kv_profiles \['half'\] must name strategies"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_entries_of_the_wrong_kind_are_refused(entry: dict[str, Any], shown: str, saved: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(saved).config
    for name, value in entry.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=shown):
        AutoModelForCausalLM.from_config(config)


def test_a_prompt_without_tokens_is_refused(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, kv_profile="half")
    with pytest.raises(UserError, match=r"^the input has no tokens; give at least one"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_a_file_is_no_folder_to_save_to(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot save to .*/file: it is a file; give the name of a folder"):
        AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("what", [None, "Qwen/Qwen3-0.6B"], ids=repr)
def test_what_is_no_model_is_refused(what: Any) -> None:
    for use in (enable_rcla, disable_rcla):
        with pytest.raises(UserError, match=r"is no model; load one of Qwen3, Qwen2, Llama or Mistral with from_pret"):
            use(what)
