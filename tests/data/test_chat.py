"""Chats: the tokenizer's own template, loss on the assistant's turns only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import train_hugging_face
from transformers import AutoTokenizer

from skvr_dist.config.data import HeldOutConfig
from skvr_dist.data.finetune.chat import ChatTemplate
from skvr_dist.data.finetune.examples import Chat
from skvr_dist.data.finetune.sequences import FinetuneSequences
from skvr_dist.data.tokenizers.hugging_face import read_hf_files
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
CALLING = (
    "{% if tools %}<s>{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}</s>{% endif %}"
    + PLAIN.replace("</s>", "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}</s>", 1)
)
FORGETFUL = PLAIN.replace("m.content }}", "m.content if loop.last else m.content.split('!')[-1] }}")
TURNS = [("user", "one?"), ("assistant", "hmm!One."), ("user", "two?"), ("assistant", "hmm!Two.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    train_hugging_face(place / "tokenizer.model")
    return place / "hf"


def template_of(folder: Path, text: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate.of(str(folder), load_tokenizer(folder))


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in turns), "chats.jsonl, line 3")


def learned(template: ChatTemplate, given: Chat, longest: int = 1000) -> list[tuple[str, bool]]:
    """What has loss in each example, and whether it was cut; special tokens as they are written."""
    decode = template.tokenizer.for_export().decode
    return [
        (decode(tokens[predicted].tolist(), skip_special_tokens=False), is_cut)
        for (tokens, predicted), is_cut in template.fit(given, longest)
    ]


def test_ids_are_those_of_transformers(folder: Path) -> None:
    template = template_of(folder, PLAIN)
    [((tokens, _), _)] = template.fit(chat(*TURNS), 1000)
    conversation = [{"role": role, "content": content} for role, content in TURNS]
    assert tokens.tolist() == AutoTokenizer.from_pretrained(folder).apply_chat_template(conversation)["input_ids"]


def test_tools_and_calls_are_written_by_the_template(folder: Path) -> None:
    function = {"type": "function", "function": {"name": "look"}}
    call = {"role": "assistant", "content": "", "tool_calls": [function]}
    given = Chat(({"role": "user", "content": "one?"}, call), "chats.jsonl, line 3", (function,))
    template = template_of(folder, CALLING)
    [((tokens, _), _)] = template.fit(given, 1000)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(list(given.messages), tools=[function])
    assert tokens.tolist() == theirs["input_ids"]
    assert learned(template, given) == [("[look]</s>", False)]
    with pytest.raises(UserError, match=r"line 3: the chat template of .* has no place for tool_calls; leave them out"):
        learned(template_of(folder, PLAIN), given)


def test_special_tokens_may_be_named_in_a_file_of_their_own(folder: Path, tmp_path: Path) -> None:
    """As older folders have them."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    named = "{{ bos_token }}user\n{{ messages[0].content }}{{ eos_token }}"
    assert template_of(tmp_path, named)._render(chat(*TURNS), 1)[0] == "<s>user\none?</s>"


def test_tokens_are_kept_for_the_same_special_tokens_only(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat(*TURNS).messages}))
    (tmp_path / "chat_template.jinja").write_text(MARKED)

    def read(bos_token: str) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos_token, "eos_token": "</s>"}))
        source = HeldOutConfig(path=str(tmp_path / "chats.jsonl"), format="chat")
        options: dict[str, Any] = {"tokenizer_path": str(tmp_path), "sequence_length": 100, "seed": 1}
        opened = FinetuneSequences.open(source, load_tokenizer(tmp_path), cache=str(tmp_path / "kept"), **options)
        return opened.fingerprint

    assert read("<s>") == read("<s>") != read("<unk>")


def test_the_loss_is_on_the_turns_of_the_assistant(folder: Path) -> None:
    wanted = [("hmm!One.</s>hmm!Two.</s>", False)]
    assert learned(template_of(folder, PLAIN), chat(*TURNS, ("user", "bye"))) == wanted
    assert learned(template_of(folder, MARKED), chat(*TURNS)) == wanted


def test_a_template_that_drops_thoughts_gives_an_example_per_turn(folder: Path) -> None:
    found = learned(template_of(folder, FORGETFUL), chat(*TURNS))
    assert found == [("hmm!One.</s>", False), ("hmm!Two.</s>", False)]


def test_last_turns_are_left_out_to_fit_and_the_first_never(folder: Path) -> None:
    template = template_of(folder, PLAIN)
    assert learned(template, chat(*TURNS[:2], ("user", "more " * 50), ("assistant", "x")), 60) == [
        ("hmm!One.</s>", True)
    ]
    with pytest.raises(UserError, match=r"line 3: the chat up to one of .* has \d+ tokens, more than data.seq.* 59; "):
        learned(template, chat(("user", "more " * 80), ("assistant", "x")), 60)


def test_the_date_is_always_the_same(folder: Path) -> None:
    template = template_of(folder, "{{ strftime_now('%d %b %Y') }}" + PLAIN)
    [((tokens, _), _)] = template.fit(chat(*TURNS), 1000)
    assert template.tokenizer.decode(tokens.tolist()).startswith("26 Jul 2024")


def test_bad_templates_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 3: the chat template of .* refuses the chat \(roles must alternate\)"):
        learned(template_of(folder, "{{ raise_exception('roles must alternate') }}"), chat(*TURNS))
    with pytest.raises(UserError, match=r"marks no part of the chat with .*, so nothing of it would be learned"):
        learned(template_of(folder, MARKED.replace("'assistant'", "'robot'")), chat(*TURNS))
    with pytest.raises(UserError, match=r"begins the assistant's message 2 otherwise when it asks for it"):
        learned(template_of(folder, PLAIN.replace("<s>assistant", "<s>robot")), chat(*TURNS))
    asking = template_of(folder, "{{ messages[0].content.strip() }}" + PLAIN)
    with pytest.raises(UserError, match=r"line 3: the chat begins with the assistant, whose turn .*; put a message"):
        learned(asking, chat(*TURNS[1:]))
    alone = folder.parent / "data/tokenizer.model"  # as a data set that was prepared with it holds it
    alone.parent.mkdir()
    alone.write_bytes(read_hf_files(folder))
    with pytest.raises(UserError, match=r"data.tokenizer .*tokenizer.model has no chat template, .*; give the folder"):
        ChatTemplate.of(str(alone), load_tokenizer(alone))
    with pytest.raises(UserError, match=r"^model .*tokenizer.model has .*; give an export of it .* --tokenizer FOLDER"):
        ChatTemplate.of(str(alone), load_tokenizer(alone), is_model=True)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"data.tokenizer .*hf has no chat template, .*; give the folder of a Hugging"):
        ChatTemplate.of(str(folder), load_tokenizer(folder))
    named = {"chat_template": [{"name": "default", "template": PLAIN}], "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert ChatTemplate.of(str(folder), load_tokenizer(folder)).text == PLAIN
