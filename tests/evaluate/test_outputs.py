"""Outputs that programs read: what is valid, which calls are equal, and what is refused before anything is decoded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.datasets import TOKENIZER
from support.gguf_models import CHAT_TEMPLATE, MODELS, write

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.commands import answers
from skvr_dist.data.finetune.prompts import Prompt, read_prompts
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate import outputs
from skvr_dist.evaluate.outputs import measure_outputs
from skvr_dist.evaluate.structured import Output, Schema
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.routing import CacheStrategy

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TOOLS = {"weather": Schema(PARAMETERS, "weather")}
CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'


@pytest.mark.parametrize(
    ("text", "valid", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", True, 1),
        (f"I look.<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}", True, 2),  # the end of the output closes a tag
        (f"<tool_call>[{CALL}]</tool_call>", True, 1),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', True, 1),  # Llama 3.1
        (f"[{CALL}, {CALL}]", True, 2),  # Mistral
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', True, 1),
        ('{"name": "weather", "arguments": {"city": "Oslo", "days": 2.5}}', False, 1),
        ('{"name": "weather", "arguments": {"city": "Oslo", "days": 2.0}}', True, 1),
        ('{"name": "weather", "arguments": {"days": 2}}', False, 1),
        ('{"name": "whether", "arguments": {"city": "Oslo"}}', False, 1),
        (f"<tool_call>{CALL}</tool_call><tool_call>{{</tool_call>", False, 0),
        ('{"city": "Oslo"}', False, 0),  # no call, and there is no schema for other outputs
        ("It rains.", False, 0),
    ],
)
def test_calls_of_tools(text: str, valid: bool, calls: int) -> None:
    output = Output.of(text)
    assert (output.is_valid(None, TOOLS), len(output.calls)) == (valid, calls)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"city": "Oslo"}', True),
        ('```json\n{"city": "Oslo"}\n```', True),
        (' {"city": "Oslo"}\n', True),
        ('{"city": "Oslo"} Done.', False),
        ('{"city": 7}', False),
        ('{"city": "Oslo", "days": NaN}', False),
        pytest.param("[" * 100_000, False, id="too deep"),
        ("", False),
    ],
)
def test_json_that_fits_a_schema(text: str, valid: bool) -> None:
    assert Output.of(text).is_valid(Schema(PARAMETERS, "x"), {}) == valid


def test_calls_are_equal_by_name_and_arguments() -> None:
    def calls(arguments: str) -> Any:
        return Output.of(f'{{"name": "f", "arguments": {arguments}}}').calls

    assert calls('{"a": 1, "b": [2.0]}') == calls('{"b": [2], "a": 1}')
    assert calls('{"a": 1}') != calls('{"a": true}') != calls('{"a": "1"}')


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no JSON schema: it is not JSON"),
        ("[]", "is no JSON schema: it is a list; give an object"),
        (
            '{"type": "text"}',
            "is no JSON schema: at type, 'text' is not valid under any of the given schemas",
        ),
        ('{"properties": {"a": {"minimum": "2"}}}', "at properties/a/minimum, '2' is not of type 'number'"),
        ('{"pattern": "("}', "is no JSON schema: at pattern, '(' is not a 'regex'"),
    ],
)
def test_a_schema_that_is_none(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "schema.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Schema.of(file)


def test_nothing_is_fetched_for_a_schema() -> None:
    schema = Schema({"$ref": "https://example.org/other.json"}, "mine")
    with pytest.raises(UserError, match=r"mine is no schema that stands alone: .*; write what it refers to into .defs"):
        schema.accepts({})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model with a tokenizer and a chat template, and a schema."""
    folder = tmp_path_factory.mktemp("outputs")
    write(folder / "model.gguf", MODELS["llama"])
    import_model(str(folder / "model.gguf"), folder / "model", check=False)
    (folder / "schema.json").write_text(json.dumps(PARAMETERS))
    return folder


def test_outputs_are_held_against_full_retention(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of four prompts with a tool; one is never answered with a call, so it says nothing of calls."""
    other = CALL.replace("Oslo", "Bergen")
    said = {"full": [CALL, CALL, "no", CALL], "every:2": [CALL, other, "no", f"[{CALL}]"]}
    monkeypatch.setattr(outputs, "decode_all", lambda *_, name, **__: said[name])
    checkpoint = Checkpoint(folder / "model")
    found = measure_outputs(
        checkpoint.load_decoder(),
        [Prompt("p", [1, 2], "x", {"weather": PARAMETERS})] * 4,
        {"every:2": CacheStrategy.every(2, checkpoint.model_config.num_hidden_layers)},
        schema=None,
        tokenizer=TOKENIZER,
        stop_tokens=[0],
        max_new_tokens=9,
    )
    full, half = found.points
    assert (full.strategy, full.valid.mean, full.same_calls.mean, full.same_text.mean) == ("full", 0.75, 1, 1)
    assert (half.valid.mean, half.same_calls.mean, half.same_text.mean) == (0.75, pytest.approx(2 / 3), 0.5)
    assert half.same_text.low < 0.5 < half.same_text.high


def test_the_command(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, schema = folder / "prompts.jsonl", folder / "schema.json"
    chat = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER]}

    def started(record: dict[str, Any], *words: str) -> int:
        file.write_text(json.dumps(record) + "\n")
        given = ["skvr-answers", str(folder / "model"), str(file), "--format", "prompts", "--decode", "5", *words]
        monkeypatch.setattr(sys, "argv", given)
        return answers.run()

    gates = ["--gate", "every:2:valid=0", "--gate", "prefix:1:calls=100"]  # nobody calls, so nobody knows
    found = ["--strategies", "every:2", "--json", str(folder / "found.json")]
    assert started({"prompt": "x"}, "--schema", str(schema), *found, *gates[:2]) == 0
    assert "valid at every:2 is worse than at full retention by +0 points; bound <= 0: met" in capsys.readouterr().out
    assert started({"prompt": "x"}, "--schema", str(schema), *found, *gates) == 1
    assert re.search(r"every:2 \|\s+66.7% \|\s+1 \|\s+0.0 \(0.0 to 0.0\) \|\s+n/a", capsys.readouterr().out)
    points = json.loads((folder / "found.json").read_text())["points"]
    assert [point["strategy"] for point in points] == ["full", "every:2", "prefix:1"]
    assert points[1]["same_calls"] == [None, None, None]  # nobody calls a tool
    for record, words, sentence in (
        (chat, [], "line 1: the chat template of .* has no place for tools; leave them out"),
        ({"prompt": "x"}, [], "line 1 has no tools, whose parameters would be its schema; give --schema FILE"),
        ({"text": "x"}, [], r"line 1 is no record of prompts \(has not one of prompt and messages\); expected a text"),
        ({"prompt": "x"}, ["--decode", "9999", "--schema", str(schema)], "new ones are more than the model's"),
        ({"prompt": "x"}, ["--format", "chat", "--schema", str(schema)], "leave it out with --format chat"),
        ({"prompt": "x"}, ["--gate", "full:F1=1"], "full:F1 is on no score that is measured; name one of valid, calls"),
    ):
        with pytest.raises(UserError, match=sentence):
            started(record, *words)


def test_tools_stand_where_the_template_has_them(folder: Path) -> None:
    tokenizer_file = next((folder / "model").rglob("tokenizer.json"))
    (folder / "tools").mkdir()
    (folder / "tools/tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (folder / "tools/tokenizer_config.json").write_text("{}")
    (folder / "tools/chat_template.jinja").write_text("{{ tools | tojson }}" + CHAT_TEMPLATE)
    record = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER]}
    (folder / "tools.jsonl").write_text(json.dumps(record) + "\n")
    tokenizer = load_tokenizer(tokenizer_file)
    [prompt] = read_prompts(folder / "tools.jsonl", tokenizer, str(folder / "tools"))
    assert prompt.tools == {"weather": PARAMETERS}
    assert '"days"' in tokenizer.decode(prompt.tokens) and tokenizer.decode(prompt.tokens).endswith("Rain?")
