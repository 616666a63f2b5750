"""What `bench serve` reads of an export before vLLM is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skvr_dist.commands.bench.serve import _head_size, _shape
from skvr_dist.errors import UserError


def test_the_heads_of_qwen2_share_its_hidden_size(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"dtype": "float32"}))
    assert _head_size(_shape(tmp_path)) == 8
    for content in ("[1]", "{}", json.dumps(shape)):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is not an export"):
            _shape(tmp_path)
