"""lm-evaluation-harness on an export at a profile, offline, on a local task file: the likelihoods of our decoder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from support.hf_models import random_weights, shape_of
from support.tokenizers import train_ours

from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import export_model
from skvr_dist.model.decoder import Decoder, next_token_loss
from skvr_dist.routing import CacheStrategy, RoutingConfig

TEXTS = ["def add(self, other):\n    return self + other\n", "class Parser(object):\n    pass\n", "import os, sys\n"]


def test_likelihood_at_a_profile(tmp_path: Path) -> None:
    config = shape_of("qwen3", vocab_size=704)
    weights = random_weights(config, scale=0.1)
    tokenizer = train_ours(tmp_path / "tokenizer.model")
    training = Training(RoutingConfig(policy="uniform", cross_layer_prob=0.5), {}, profiles={"bulk": "every:4"})
    export_model(
        config,
        weights,
        weights.__getitem__,
        tokenizer,
        tmp_path / "export",
        training=training,
        dtype=torch.float32,
    )
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "texts.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(task))
    options = {"pretrained": str(tmp_path / "export"), "dtype": "float32", "kv_profile": "bulk", "device": "cpu"}
    results = simple_evaluate("hf", options, tasks=["texts"], task_manager=TaskManager(include_path=str(tmp_path)))
    found = results["results"]["texts"]["byte_perplexity,none"]

    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    sources = CacheStrategy.parse("every:4", 8).kv_source_layers
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[2, *load_tokenizer(tokenizer).encode(text)]])  # a text follows the end of another one
        nats += float(next_token_loss(decoder(ids[:, :-1], sources), ids[:, 1:]).detach()) * (ids.shape[1] - 1)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(math.exp(nats / size), rel=1e-4)
