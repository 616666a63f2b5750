"""Workloads that are made from Python's own standard library: a support desk and a code assistant.

Both draw from documents that `tools/prepare_data.py` holds out, so that a model which was trained on the library is not
asked about what it has read. Chats to train a model for the desk draw from the others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from skvr_dist.data.prepare.corpus import Document, hash_fraction
from skvr_dist.errors import UserError
from skvr_dist.evaluate.completion import held_out_lines
from skvr_dist.evaluate.replay.trace import Request, poisson_arrivals

_SHORTEST = 120
"""Characters of a documentation that something can be asked about."""
_PROMPT_TO_ANSWER = 4
"""An answer to train on has at most the characters of a prompt's documentation over this."""
_QUESTIONS = (
    "What does {name} do?",
    "How do I call {name}, and what do its arguments mean?",
    "What does {name} return, and when does it raise?",
    "Give me a short example with {name}.",
    "When should I use {name}, and what should I look out for?",
)
_DESK = (
    "You work at the support desk of Python's standard library. Answer the question from this documentation, in a few "
    "sentences.\n\n{documentation}"
)


class Entry(NamedTuple):
    """The documentation of a module, a class or a function."""

    name: str
    signature: str
    text: str

    @property
    def shown(self) -> str:
        return f"{self.signature}\n{self.text}\n"


class _Asked(NamedTuple):
    """A question about an entry, beside others of its module."""

    entry: Entry
    others: list[Entry]
    question: str

    def prompt(self, characters: int, generator: np.random.Generator) -> tuple[str, str]:
        """What the desk has read, with so many characters of documentation, and the question."""
        documentation = _documentation(self.entry, self.others, characters, generator)
        return _DESK.format(documentation=documentation), self.question.format(name=self.entry.name)


class Workload(NamedTuple):
    """How many requests of which size."""

    requests: int
    rate: float
    """Requests that arrive in a second, on average."""
    characters: int
    """Of a prompt's documentation or code, at most; a third of them at least, where there are as many."""
    max_tokens: int
    """Wanted, at most; each request wants a quarter of them at least."""
    seed: int


def support_desk(
    documents: Iterable[Document], workload: Workload, *, validation_share: float, as_chat: bool
) -> list[Request]:
    """Questions about functions and classes, with their documentation among that of others of the same module.

    Args:
        documents: Python files.
        as_chat: as messages, for models with a chat template; else as one text.

    Raises:
        UserError: fewer questions can be asked than are wanted.
    """
    generator = np.random.default_rng(workload.seed)
    held_out = (document for document in documents if hash_fraction(document.text, "validation") < validation_share)
    asked = _what_is_asked(held_out)
    _require_enough(len(asked), workload.requests, validation_share)
    prompts = [
        (one.entry.name, *one.prompt(_drawn_size(workload.characters, 3, generator), generator))
        for one in (asked[number] for number in generator.permutation(len(asked))[: workload.requests])
    ]
    return _requests(prompts, workload, generator, as_chat=as_chat)


def support_desk_chats(
    documents: Iterable[Document], workload: Workload, *, validation_share: float
) -> list[list[dict[str, str]]]:
    """Chats to train on before such a desk is served: questions about the documents that are *not* held out, each
    answered with the first paragraph of the documentation, unless that is a long one.

    Args:
        documents: Python files.
        workload: how many of which size; its rate and tokens are not used.

    Returns:
        Messages of the system, the user and the assistant, of each chat; fewer than are wanted where there are not as
        many.

    Raises:
        UserError: there are none.
    """
    generator = np.random.default_rng(workload.seed)
    trained = (document for document in documents if hash_fraction(document.text, "validation") >= validation_share)
    asked = _what_is_asked(trained)
    chats: list[list[dict[str, str]]] = []
    for number in generator.permutation(len(asked)):
        if len(chats) == workload.requests:
            break
        one = asked[number]
        answer = " ".join(one.entry.text.split("\n\n")[0].split())
        if len(answer) > workload.characters // _PROMPT_TO_ANSWER:
            continue
        system, user = one.prompt(_drawn_size(workload.characters, 3, generator), generator)
        said = {"system": system, "user": user, "assistant": answer}
        chats.append([{"role": role, "content": text} for role, text in said.items()])
    if not chats:
        raise UserError(
            f"of {len(asked)} questions about what --validation-share {validation_share:g} does not hold out, none has "
            f"an answer of at most a quarter of --characters {workload.characters}; lower the share, or raise the "
            f"characters"
        )
    return chats


def code_assistant(documents: Iterable[Document], workload: Workload, *, validation_share: float) -> list[Request]:
    """Source files up to a line, to be continued there.

    Raises:
        UserError: fewer lines can be completed than are wanted.
    """
    generator = np.random.default_rng(workload.seed)
    lines = list(held_out_lines(documents, validation_share, workload.requests))
    _require_enough(len(lines), workload.requests, validation_share)
    prompts = []
    for number in generator.permutation(len(lines)):
        line = lines[number]
        before = line.before[-_drawn_size(workload.characters, 3, generator) :]
        if len(before) < len(line.before):  # begin with a whole line
            before = before[before.find("\n") + 1 :] or before
        prompts.append((f"{line.document}, line {line.number}", before, ""))
    return _requests(prompts, workload, generator, as_chat=False)


def _what_is_asked(documents: Iterable[Document]) -> list[_Asked]:
    """Each question about each entry that is long enough."""
    return [
        _Asked(entry, entries, question)
        for entries in (list(_entries(document)) for document in documents)
        for entry in entries
        if len(entry.text) >= _SHORTEST
        for question in _QUESTIONS
    ]


def _requests(
    prompts: list[tuple[str, str, str]], workload: Workload, generator: np.random.Generator, *, as_chat: bool
) -> list[Request]:
    """Prompts (name, what is read, question) with their arrivals."""
    requests = []
    arrivals = poisson_arrivals(len(prompts), workload.rate, generator)
    for arrival, (name, text, question) in zip(arrivals, prompts, strict=True):
        wanted = _drawn_size(workload.max_tokens, 4, generator)
        if as_chat:
            messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
            requests.append(Request(arrival=arrival, messages=messages, max_tokens=wanted, name=name))
        else:
            prompt = f"{text}\nQuestion: {question}\nAnswer:" if question else text
            requests.append(Request(arrival=arrival, prompt=prompt, max_tokens=wanted, name=name))
    return requests


def _drawn_size(most: int, part: int, generator: np.random.Generator) -> int:
    """A size from `most / part` to `most`, all alike."""
    return int(generator.integers(max(1, most // part), most + 1))


def _require_enough(found: int, wanted: int, validation_share: float) -> None:
    if found < wanted:
        raise UserError(
            f"--requests {wanted} are more than the {found} that the documents held out at --validation-share "
            f"{validation_share:g} give; ask for fewer, or raise the share"
        )


def _documentation(asked: Entry, others: list[Entry], characters: int, generator: np.random.Generator) -> str:
    """What the desk has found: the entry asked about, somewhere among others of its module."""
    chosen, room = [asked], characters - len(asked.shown)
    for number in generator.permutation(len(others)):
        entry = others[number]
        if entry is not asked and len(entry.shown) <= room:
            chosen.append(entry)
            room -= len(entry.shown)
    return "\n".join(chosen[number].shown[:characters] for number in generator.permutation(len(chosen)))


def _entries(document: Document) -> Iterator[Entry]:
    """A module's documentation and those of its public functions, classes and methods; none of what is no Python."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    module = document.id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if text := ast.get_docstring(tree):
        yield Entry(module, f"module {module}", text)
    yield from _within(tree, module)


def _within(tree: ast.Module | ast.ClassDef, owner: str) -> Iterator[Entry]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, text = f"{owner}.{node.name}", ast.get_docstring(node)
        if text:
            parameters = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield Entry(name, f"{name}{parameters}", text)
        if isinstance(node, ast.ClassDef):
            yield from _within(node, name)
