"""Files of fine-tuning examples, in the forms in which their authors publish them.

Each reader yields the examples of a file in its order, `None` for a record that has no answer (some of MS MARCO and
TriviaQA), and refuses the first record that does not fit. docs/finetuning.md describes the formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow.parquet
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator

from skvr_dist.config.data import Format
from skvr_dist.data.finetune.examples import SAID_BESIDE, Chat, ExampleError, QuestionAnswer
from skvr_dist.data.prepare.formats import HALF_A_PAIR, parse_json, read_lines, reading
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, require_file
from skvr_dist.section import in_words

NO_ANSWER = "unanswerable"
"""The answer to SQuAD's questions without one; lm-evaluation-harness asks models for the same word (task squadv2)."""

Examples = Iterator[QuestionAnswer | Chat | None]
_Record = TypeVar("_Record", bound=BaseModel)
_LONGEST_REASON = 300


class Part(BaseModel):
    """A record of a file, or a part of one; keys that are not read are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Example(Part):
    context: str
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    group: str = ""


def _read_examples(path: Path) -> Examples:
    """Our own: jsonl, a line {context, question, answer}."""
    expected = "the keys context, question and answer, each a text, the last two not empty"
    for place, record in _json_lines(path, "examples", expected):
        found = parsed(_Example, record, place, "examples", expected)
        passages = (found.context,) if found.context else ()
        yield QuestionAnswer(passages, found.question, found.answer, place, group=found.group)


class _SquadAnswer(Part):
    text: str = Field(min_length=1)


class _SquadQuestion(Part):
    question: str = Field(min_length=1)
    answers: list[_SquadAnswer]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _has_its_answer(self) -> _SquadQuestion:
        if not (self.answers or self.is_impossible):
            raise ValueError("has no answers, and is_impossible is not true")
        return self


class _SquadParagraph(Part):
    context: str
    qas: list[_SquadQuestion]


class _SquadArticle(Part):
    paragraphs: list[_SquadParagraph]


def _read_squad(path: Path) -> Examples:
    """SQuAD v2 (and v1.1): one JSON object, `data` a list of articles."""
    kind = "SQuAD"
    expected = "paragraphs[] of {context, qas[] of {question, answers[] of {text}, is_impossible}}"
    for number, record in enumerate(_list_of(_json(path, kind), path, "data", kind, expected)):
        place = f"{path}, data[{number}]"
        for paragraph in parsed(_SquadArticle, record, place, kind, expected).paragraphs:
            for asked in paragraph.qas:
                answer, *others = [NO_ANSWER] if asked.is_impossible else [answer.text for answer in asked.answers]
                scored = ("",) if asked.is_impossible else None
                yield QuestionAnswer(
                    (paragraph.context,), asked.question.strip(), answer, place, tuple(others), scored=scored
                )


class _HotpotRecord(Part):
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    context: list[Annotated[tuple[str, list[str]], Strict(strict=False)]]


def _read_hotpotqa(path: Path) -> Examples:
    """HotpotQA in the distractor setting: a JSON list; a sentence begins with the space that parts it from the last."""
    kind = "HotpotQA"
    expected = "{question, answer, context[] of [title, [sentences]]}"
    for number, record in enumerate(_list_of(_json(path, kind), path, None, kind, expected)):
        place = f"{path}, [{number}]"
        found = parsed(_HotpotRecord, record, place, kind, expected)
        passages = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in found.context)
        yield QuestionAnswer(passages, found.question, found.answer, place)


class _MarcoPassage(Part):
    passage_text: str


class _MarcoRecord(Part):
    query: str = Field(min_length=1)
    answers: list[str]
    passages: list[_MarcoPassage]


def _read_ms_marco(path: Path) -> Examples:
    """MS MARCO v2 (QnA): one JSON object of columns, each an object by row; or jsonl with a record per line."""
    kind = "MS MARCO QnA v2"
    expected = "{query, answers[], passages[] of {passage_text}}, by columns (.json) or by lines (.jsonl)"
    lines = _json_lines(path, kind, expected) if _is_jsonl(path) else _columns(path, kind, expected)
    for place, record in lines:
        found = parsed(_MarcoRecord, record, place, kind, expected)
        answers = [answer for answer in found.answers if answer.strip()]
        passages = tuple(passage.passage_text for passage in found.passages)
        yield QuestionAnswer(passages, found.query.strip(), answers[0], place, tuple(answers[1:])) if answers else None


def _columns(path: Path, kind: str, expected: str) -> Iterator[tuple[str, Any]]:
    """The rows of an object of columns, as pandas writes it."""
    table = _json(path, kind)
    names = ("query", "answers", "passages")
    if not (isinstance(table, dict) and all(isinstance(table.get(name), dict) for name in names)):
        raise ExampleError(str(path), f"{kind} file", f"it has not the columns {', '.join(names)}", expected)
    for row in table["query"]:
        yield f"{path}, row {row}", {name: table[name][row] for name in names if row in table[name]}


class _TriviaAnswer(Part):
    value: str = Field(alias="Value")
    aliases: list[str] = Field(alias="Aliases", default=[])
    normalized: list[str] = Field(alias="NormalizedAliases", default=[])
    human: list[str] = Field(alias="HumanAnswers", default=[])


class _TriviaDocument(Part):
    file: str = Field(alias="Filename", min_length=1)


class _TriviaRecord(Part):
    question: str = Field(alias="Question", min_length=1)
    answer: _TriviaAnswer = Field(alias="Answer")
    pages: list[_TriviaDocument] = Field(alias="EntityPages", default=[])
    results: list[_TriviaDocument] = Field(alias="SearchResults", default=[])


def _read_triviaqa(path: Path) -> Examples:
    """TriviaQA for reading comprehension: `qa/*.json`, its documents below `evidence/` beside that folder."""
    kind = "TriviaQA (RC)"
    expected = "{Question, Answer.Value, EntityPages[] and SearchResults[] of {Filename}}"
    evidence = path.absolute().parent.parent / "evidence"
    for number, record in enumerate(_list_of(_json(path, kind), path, "Data", kind, expected)):
        place = f"{path}, Data[{number}]"
        found = parsed(_TriviaRecord, record, place, kind, expected)
        files = [evidence / "wikipedia" / page.file for page in found.pages]
        files += [evidence / "web" / page.file for page in found.results]
        texts = tuple(_text(file, place) for file in files)
        answer, others = found.answer.value, tuple(found.answer.aliases)
        scored = (*found.answer.normalized, *found.answer.human) or None  # as triviaqa_evaluation.py has them
        has_both = texts and answer.strip()
        yield QuestionAnswer(texts, found.question, answer, place, others, scored=scored) if has_both else None


def _text(file: Path, place: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise UserError(
            f"{place} names the document {file}, which is not there; unpack the whole of triviaqa-rc, so that "
            f"evidence/ is beside qa/"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None


class _RepliqaRecord(Part):
    document: str = Field(alias="document_extracted", min_length=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def _read_repliqa(path: Path) -> Examples:
    """RepLiQA: parquet as published, or jsonl of the same columns."""
    kind = "RepLiQA"
    expected = "document_extracted, question and answer, each a text that is not empty"
    for place, record in _json_lines(path, kind, expected) if _is_jsonl(path) else _rows(path):
        found = parsed(_RepliqaRecord, record, place, kind, expected)
        yield QuestionAnswer((found.document,), found.question, found.answer, place)


def _read(value: Any) -> Any:
    """A value that may be written as the JSON of it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


class _Message(Part):
    role: str = Field(min_length=1)
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    name: Any = None
    tool_call_id: Any = None
    weight: float | None = None

    @model_validator(mode="after")
    def _can_be_learned(self) -> _Message:
        if self.content is None and not any(getattr(self, key) for key in SAID_BESIDE):
            raise ValueError("has no content")
        if self.role == "assistant" and self.weight not in (None, 1):
            raise ValueError(f"has weight {self.weight:g}, but all turns of the assistant are learned alike")
        return self

    def written(self) -> dict[str, Any]:
        """What a template is given of it."""
        said = {key: value for key, value in self.model_dump(exclude={"weight"}).items() if value}
        # Interfaces have arguments as a text, of which templates would write the JSON: a text in quotes.
        calls = [call.get("function", call) for call in said.get("tool_calls", ())]
        for function in [*calls, said.get("function_call")]:
            if isinstance(function, dict) and "arguments" in function:
                function["arguments"] = _read(function["arguments"])
        return {"role": self.role, "content": "", **said}


class _ChatRecord(Part):
    messages: list[_Message]
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(_read)] = None
    functions: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _assistant_speaks(self) -> _ChatRecord:
        if self.functions:  # else a model would silently learn to answer without them
            raise ValueError("has functions, which would not be learned; name them as tools")
        answers = [message for message in self.messages if message.role == "assistant"]
        if not any(getattr(message, key) for message in answers for key in ("content", *SAID_BESIDE)):
            raise ValueError("no message is the assistant's")
        return self


def _read_chat(path: Path) -> Examples:
    """Chats: jsonl, a line {messages: [{role, content}]}, perhaps with tools and what else a chat template writes."""
    expected = "messages[] of {role, content}, also tool_calls, one of them at least the assistant's; also tools[]"
    for place, record in _json_lines(path, "chats", expected):
        chat = parsed(_ChatRecord, record, place, "chats", expected)
        yield Chat(tuple(message.written() for message in chat.messages), place, tuple(chat.tools or ()))


READERS: dict[Format, Callable[[Path], Examples]] = {
    "examples": _read_examples,
    "squad": _read_squad,
    "hotpotqa": _read_hotpotqa,
    "ms_marco": _read_ms_marco,
    "triviaqa": _read_triviaqa,
    "repliqa": _read_repliqa,
    "chat": _read_chat,
}


def read_examples(path: str | Path, form: Format) -> Examples:
    """The examples of a file; None for a record that has no answer.

    Raises:
        UserError: the file cannot be read, or a record does not fit the format.
    """
    return READERS[form](local_path(path))


def _is_jsonl(path: Path) -> bool:
    return ".jsonl" in Path(path.name.lower()).suffixes


def _json(path: Path, kind: str) -> Any:
    """The value of a JSON file, which is held in memory."""
    content = b"".join(read_lines(path))
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no {kind} file: it is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        found = "it is empty" if not content.strip() else f"it is not JSON at its line {error.lineno}: {error.msg}"
        raise UserError(f"{path} is no {kind} file: {found}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is no {kind} file: {error}") from None


def _list_of(value: Any, path: Path, key: str | None, kind: str, expected: str) -> list[Any]:
    """The list of records in a JSON value, which is under a key if there is one."""
    records = value.get(key) if key and isinstance(value, dict) else value if key is None else None
    if not isinstance(records, list):
        found = f"it has no list under the key {key}" if key else "it is no list"
        raise ExampleError(str(path), f"{kind} file", found, f"a list of {expected}")
    return records


def _json_lines(path: Path, kind: str, expected: str) -> Iterator[tuple[str, Any]]:
    """The value of each line that is not blank, with its place."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ExampleError(place, f"record of {kind}", f"it is not JSON: {error}", expected) from None
            yield place, record


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file, with their places."""
    with reading(path):
        require_file(path)
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            for record in batch.to_pylist():
                yield f"{path}, row {row}", record
                row += 1


def parsed(model: type[_Record], record: Any, place: str, kind: str, expected: str) -> _Record:
    """A record as a model, whose texts are valid.

    Raises:
        ExampleError: it does not fit.
    """
    try:
        found = model.model_validate(record)
        found.model_dump_json()
    except ValidationError as error:
        reason = in_words(error)
        short = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
        raise ExampleError(place, f"record of {kind}", short, expected) from None
    except ValueError:
        raise ExampleError(place, f"record of {kind}", HALF_A_PAIR, expected) from None
    return found
