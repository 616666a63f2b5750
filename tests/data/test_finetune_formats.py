"""Every published format is read as it is published, and the first record that does not fit is named."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from skvr_dist.config.data import Format
from skvr_dist.data.finetune.examples import Chat, QuestionAnswer
from skvr_dist.data.finetune.formats import NO_ANSWER, read_examples
from skvr_dist.errors import UserError

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Tea",
            "paragraphs": [
                {
                    "context": "Tea is brewed from leaves.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "What is tea brewed from? ",
                            "answers": [{"text": "leaves", "answer_start": 19}],
                            "is_impossible": False,
                        },
                        {
                            "id": "2",
                            "question": "Who brews it?",
                            "answers": [],
                            "plausible_answers": [{"text": "leaves", "answer_start": 19}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}
HOTPOTQA: list[Any] = [
    {
        "_id": "5",
        "question": "Which river?",
        "answer": "Ouse",
        "supporting_facts": [["York", 0]],
        "context": [["York", ["York is a city.", " It lies on the Ouse."]], ["Leeds", ["Leeds is another."]]],
        "type": "bridge",
        "level": "easy",
    }
]
MS_MARCO: dict[str, dict[str, Any]] = {
    "answers": {"7": ["In winter."], "9": ["No Answer Present."], "11": []},
    "passages": {
        "7": [{"is_selected": 1, "passage_text": "Snow falls in winter.", "url": "u"}, {"passage_text": "Rain."}],
        "9": [{"is_selected": 0, "passage_text": "Hail.", "url": "u"}],
        "11": [],
    },
    "query": {"7": "when does snow fall", "9": "why", "11": "who"},
    "query_id": {"7": 1, "9": 2, "11": 3},
    "query_type": {"7": "DESCRIPTION", "9": "DESCRIPTION", "11": "PERSON"},
    "wellFormedAnswers": {"7": "[]", "9": "[]", "11": "[]"},
}
TRIVIAQA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Sol"],
                "HumanAnswers": ["Our Sun"],
                "NormalizedAliases": ["sol", "sun"],
                "NormalizedValue": "sun",
                "Type": "WikipediaEntity",
                "Value": "Sun",
            },
            "EntityPages": [{"DocSource": "TagMe", "Filename": "Star.txt", "Title": "Star"}],
            "SearchResults": [{"Filename": "8/8_1.txt", "Rank": 1, "Title": "t", "Url": "u"}],
            "Question": "Which star is nearest?",
            "QuestionId": "q",
        },
        {"Answer": {"Value": "Moon"}, "EntityPages": [], "Question": "What circles the Earth?", "QuestionId": "r"},
    ],
    "Domain": "Wikipedia",
    "Version": 1.0,
}
REPLIQA = {
    "document_id": "d",
    "document_topic": "News",
    "document_extracted": "The bridge opened on Monday.",
    "question": "When did it open?",
    "answer": "On Monday.",
    "long_answer": "The bridge opened on Monday.",
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def read(file: Path, form: Format, content: Any) -> list[Any]:
    lines = content if isinstance(content, str) else json.dumps(content)
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return list(read_examples(file, form))


def test_squad(tmp_path: Path) -> None:
    place = f"{tmp_path}/a.json, data[0]"
    assert read(tmp_path / "a.json", "squad", SQUAD) == [
        QuestionAnswer(("Tea is brewed from leaves.",), "What is tea brewed from?", "leaves", place),
        QuestionAnswer(("Tea is brewed from leaves.",), "Who brews it?", NO_ANSWER, place, scored=("",)),
    ]


def test_hotpotqa(tmp_path: Path) -> None:
    passages = ("York\nYork is a city. It lies on the Ouse.", "Leeds\nLeeds is another.")
    found = read(tmp_path / "a.json.gz", "hotpotqa", HOTPOTQA)
    assert found == [QuestionAnswer(passages, "Which river?", "Ouse", f"{tmp_path}/a.json.gz, [0]")]


def test_ms_marco_by_columns_and_by_lines(tmp_path: Path) -> None:
    found = read(tmp_path / "a.json", "ms_marco", MS_MARCO)
    passages = ("Snow falls in winter.", "Rain.")
    assert found == [
        QuestionAnswer(passages, "when does snow fall", "In winter.", f"{tmp_path}/a.json, row 7"),
        QuestionAnswer(("Hail.",), "why", "No Answer Present.", f"{tmp_path}/a.json, row 9"),
        None,
    ]
    rows = [{name: column[row] for name, column in MS_MARCO.items()} for row in ("7", "9", "11")]
    again = read(tmp_path / "B.JSONL", "ms_marco", "\n".join(json.dumps(row) for row in rows))
    assert [each and each.answer for each in again] == [each and each.answer for each in found]


def test_triviaqa_with_its_evidence(tmp_path: Path) -> None:
    for name, text in (("wikipedia/Star.txt", "The Sun is a star."), ("web/8/8_1.txt", "Sol is near.\n")):
        (tmp_path / "evidence" / name).parent.mkdir(parents=True)
        (tmp_path / "evidence" / name).write_text(text)
    file = tmp_path / "qa/web-train.json"
    place = f"{file}, Data[0]"
    texts, scored = ("The Sun is a star.", "Sol is near."), ("sol", "sun", "Our Sun")
    wanted = QuestionAnswer(texts, "Which star is nearest?", "Sun", place, ("Sol",), scored=scored)
    assert read(file, "triviaqa", TRIVIAQA) == [wanted, None]
    (tmp_path / "evidence/web/8/8_1.txt").unlink()
    with pytest.raises(UserError, match=r"Data\[0\] names the document .*web/8/8_1.txt, which is not there; unpack"):
        read(file, "triviaqa", TRIVIAQA)


def test_repliqa_as_parquet_and_lines(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([REPLIQA]), tmp_path / "a.parquet")
    [found] = read_examples(tmp_path / "a.parquet", "repliqa")
    place = f"{tmp_path}/a.parquet, row 0"
    assert isinstance(found, QuestionAnswer)
    assert found == QuestionAnswer(("The bridge opened on Monday.",), "When did it open?", "On Monday.", place)
    [again] = read(tmp_path / "a.jsonl", "repliqa", REPLIQA)
    assert (again.passages, again.question, again.answer) == (found.passages, found.question, found.answer)


def test_chats_and_our_own_examples(tmp_path: Path) -> None:
    place, call = f"{tmp_path}/a.jsonl, line 1", {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    chat = {**CHAT, "tools": [], "id": 1}
    assert read(tmp_path / "a.jsonl", "chat", chat) == [Chat(tuple(CHAT["messages"]), place)]
    chat = {"messages": [{**CHAT["messages"][0], "weight": 0}, call], "tools": [{"type": "function"}]}
    right = Chat((CHAT["messages"][0], {**call, "content": ""}), place, ({"type": "function"},))
    assert read(tmp_path / "a.jsonl", "chat", chat) == [right]
    assert read(tmp_path / "a.jsonl", "chat", {**chat, "tools": '[{"type": "function"}]'}) == [right]
    said = {"tool_calls": [{"function": {"arguments": '{"x": 1}'}}], "function_call": {"arguments": "no JSON"}}
    [found] = read(tmp_path / "a.jsonl", "chat", {"messages": [{"role": "assistant", **said}]})
    assert isinstance(found, Chat)
    assert found.messages[0] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"arguments": {"x": 1}}}],
        "function_call": {"arguments": "no JSON"},
    }
    ours = {"context": "", "question": "q", "answer": "a", "n": "number"}
    lines = codecs.BOM_UTF8.decode() + "\r\n\r\n" + json.dumps(ours).replace('"number"', "7" * 5000)
    assert read(tmp_path / "b.jsonl.gz", "examples", lines)[0].question == "q"


HALF = json.dumps({"context": "\ud800", "question": "a", "answer": "b"})
DEEP = '{"context": "", "question": "a", "answer": "b", "more": ' + "[" * 10**5 + "]" * 10**5 + "}"
BROKEN_SQUAD = {
    "data": [SQUAD["data"][0], {"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]
}


@pytest.mark.parametrize(
    ("form", "content", "sentence"),
    [
        ("squad", "", r"is no SQuAD file: it is empty"),
        ("squad", "{", "is not JSON at its line 1"),
        ("squad", HOTPOTQA, r"it has no list under the key data\); expected a list of paragraphs"),
        ("squad", BROKEN_SQUAD, r"data\[1\] is no record of SQuAD \(paragraphs.0.qas.0: has no answers, and is_imp"),
        ("hotpotqa", SQUAD, r"it is no list\); expected a list of \{question, answer, context"),
        ("hotpotqa", [HOTPOTQA[0], {"question": "q"}], r"\[1\] is no record of HotpotQA \(answer: Field required; con"),
        ("ms_marco", SQUAD, "it has not the columns query, answers, passages"),
        ("ms_marco", {**MS_MARCO, "answers": {"7": ["x"]}}, r"row 9 is no record of MS MARCO QnA v2 \(answers: Field"),
        ("triviaqa", HOTPOTQA, "it has no list under the key Data"),
        ("triviaqa", {"Data": [{"Question": "q"}]}, r"Data\[0\] is no record of TriviaQA \(RC\) \(Answer: Field req"),
        ("repliqa", SQUAD, "not a parquet file|Parquet"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "x"}]},
            r"line 1 is no record of chats \(messages|no message is the ass",
        ),
        (
            "chat",
            {"messages": "x"},
            r"line 1 is no record of chats \(messages: .*\); expected messages\[\] of \{role, content\}",
        ),
        ("chat", {**CHAT, "functions": [{}]}, r"has functions, which would not be learned; name them as tools"),
        (
            "chat",
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}, *CHAT["messages"]]},
            r"no record of chats \(messages.0: has weight 0, but all turns of the assistant are learned alike",
        ),
        ("examples", "{", "line 1 is no record of examples .it is not JSON"),
        (
            "examples",
            '{"context": "", "question": "a", "answer": ""}',
            "line 1 is no record of examples .answer: String should",
        ),
        ("examples", '["", "a", "b"]', "expected the keys context, question and answer, each a text, the last two"),
        ("examples", HALF, r"line 1 is no record of examples \(.*holds half of a surrogate pair|surrogate"),
        ("examples", DEEP, r"line 1 is no record of examples .it is not JSON: is nested too deeply"),
    ],
)
def test_the_first_record_that_does_not_fit_is_named(tmp_path: Path, form: Format, content: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        read(tmp_path / "a.json", form, content)
    assert "\n" not in str(refused.value) and str(tmp_path / "a.json") in str(refused.value)
