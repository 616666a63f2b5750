"""What `bench serve` reads of an export before vLLM is there."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from skvr_dist.commands.bench.serve import _head_size, _require_room, _shape
from skvr_dist.errors import UserError


def test_the_heads_of_qwen2_share_its_hidden_size(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_attention_heads": 4}
    shape["max_position_embeddings"] = 256
    for dtype in ("float32", "bfloat16", "float16"):
        (tmp_path / "config.json").write_text(json.dumps(shape | {"dtype": dtype}))
        assert _head_size(_shape(tmp_path)) == 8
    for content in ("[1]", "{}", json.dumps(shape)):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is not an export"):
            _shape(tmp_path)


def test_a_cache_that_is_too_small_for_one_sequence_is_refused() -> None:
    asked = Namespace(full_requests=10, prompt_tokens=16, new_tokens=8, long_prompt_tokens=2000)
    _require_room(asked, 2176, 2176)
    with pytest.raises(UserError, match=r"make a cache of 240 tokens, .* takes 2,176; ask for --full-requests 91, or"):
        _require_room(asked, 240, 2176)
