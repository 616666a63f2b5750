"""Reading a configuration: YAML files, later ones over earlier ones, and dotted overrides `section.key=value`.

A file may `include:` others, which come before it. Mistakes are told in one sentence each.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from skvr_dist.config.data import DataConfig
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.train import TrainConfig
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, require_file
from skvr_dist.schedule import FORMS
from skvr_dist.section import Section, dotted, section_in

_LONGEST_VALUE = 80


def load_config(
    files: Sequence[str | Path], overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None
) -> Config:
    """Read, merge and validate a configuration.

    Args:
        files: YAML files; a later one overrides an earlier one key by key.
        overrides: `section.key=value` texts, the value in YAML.
        base: a plain tree that the files override.

    Raises:
        UserError: a file is missing or unreadable, a key is unknown, a value is of the wrong type or impossible.
    """
    return validate_config(_merge_all(files, overrides, base))


def load_data_config(
    files: Sequence[str | Path], overrides: Sequence[str] = ()
) -> tuple[DataConfig, int, TrainConfig | None]:
    """Read what decides which sequences a run reads: `data`, `train.seed` and, if the tree is whole, all of `train`.

    Other sections may be missing, as they are in the configuration of an imported checkpoint; none may be wrong.

    Raises:
        UserError: as `load_config` does.
    """
    tree = _merge_all(files, overrides)
    if "data" not in tree:
        needed = [f"data.{name}=..." for name, field in DataConfig.model_fields.items() if field.is_required()]
        raise UserError(f"the configuration names no data; add {' '.join(needed)}")
    try:
        config = Config.model_validate(tree)
        return config.data, config.train.seed, config.train
    except ValidationError as error:
        wrong = [item for item in error.errors() if item["type"] != "missing" or item["loc"][0] == "data"]
        if wrong:
            raise UserError("; ".join(sentences(wrong))) from None
    seed = TrainConfig.model_fields["seed"].default
    return DataConfig.model_validate(tree["data"]), tree.get("train", {}).get("seed", seed), None


def load_model_config(files: Sequence[str | Path], **changes: Any) -> ModelConfig:
    """Read the shape of a model alone; other sections are not looked at.

    Args:
        changes: keys of the section with values of their own.

    Raises:
        UserError: as `load_config` does.
    """
    section, read = _merge_all(files, ()).get("model"), " and ".join(map(str, files))
    if not isinstance(section, Mapping):
        raise UserError(f"no model section is in {read}; give a file of configs/model")
    try:
        return ModelConfig(**{**section, **changes})
    except ValidationError as error:
        raise UserError("; ".join(sentences(error.errors(), ModelConfig))) from None


def _merge_all(
    files: Sequence[str | Path], overrides: Sequence[str], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    tree: dict[str, Any] = dict(base or {})
    for file in files:
        tree = _merge(tree, read_tree(Path(file)))
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


def validate_config(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree. Raises `UserError` with one sentence per mistake."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError("; ".join(sentences(error.errors()))) from None


def dump_config(config: Config) -> str:
    """A configuration as YAML, every key with its value, which `load_config` reads back to the same tree."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2 and with 1_000 for a thousand; keys are texts, each given once.

    So 1e-4 is a number and 010 is ten; 1:30, dates and `off` are texts.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _TAG + "merge":
                continue
            if key.tag != _TAG + "str":
                raise yaml.composer.ComposerError(None, None, f"key {key.value} is not a text", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text.lstrip("+-")[1:2] in ("x", "o") else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers to YAML 1.1 or to `_Loader`."""


_NUMBERS = {
    "int": r"[-+]?(\d+(_\d+)*|0o[0-7]+|0x[0-9a-fA-F]+)",
    "float": r"[-+]?((\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag not in {_TAG + kind for kind in (*_NUMBERS, "bool", "timestamp")}]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _kind, _form in _NUMBERS.items():
    for _reads_or_writes in (_Loader, _Dumper):
        _reads_or_writes.add_implicit_resolver(_TAG + _kind, re.compile(f"^({_form})$"), list("-+.0123456789"))
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


def read_tree(file: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain tree of a YAML file, over those of the files that it includes; not validated.

    Args:
        seen: files that lead to this one by `include`, which it must not include again.

    Raises:
        UserError: it cannot be read, is not YAML, or includes itself.
    """
    place = os.path.realpath(file)  # `resolve` raises where links lead in a circle
    if place in seen:
        raise UserError(f"configuration {file} includes itself")
    try:
        require_file(file)
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read configuration {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"configuration {file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        tree = _parse(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"configuration {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"configuration {file} must hold sections, not a {type(tree).__name__}")
    merged: dict[str, Any] = {}
    included = tree.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"configuration {file} includes {included!r}; give a file or a list of files")
    for name in names:
        merged = _merge(merged, read_tree(file.parent / local_path(name), (*seen, place)))
    return _merge(merged, tree)


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {_shown(text)} must look like section.key=value")
    try:
        node: Any = _parse(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"override {_shown(text)}: the value is not valid YAML ({reason})") from None
    keys = path.split(".")
    if not all(keys):
        raise UserError(f"override {_shown(text)} must look like section.key=value; a key is empty")
    for key in reversed(keys):
        node = _Keys({key: node})
    return node


def _parse(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it says nothing that can be understood.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # a number of thousands of digits, no such day, a knot
        raise yaml.YAMLError(" ".join(str(error).split())) from None


class _Keys(dict[str, Any]):
    """What the dotted name of an override leads through: of a section or a schedule it changes that key alone."""


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        # A schedule stands for a number: a whole one takes nothing of the one before, such as its unit.
        is_whole = isinstance(value, Mapping) and isinstance(value.get("points"), list) and not isinstance(value, _Keys)
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and not is_whole:
            merged[key] = _merge(merged[key], value)
        elif isinstance(value, _Keys):
            merged[key] = _merge({}, value)
        else:
            merged[key] = value
    return merged


def sentences(mistakes: Iterable[ErrorDetails], root: type[Section] = Config) -> Iterator[str]:
    """One sentence per mistake: the path of the key, the value, what is allowed, the nearest known name.

    Args:
        root: the section that was validated.
    """
    for item in mistakes:
        keys = tuple(part for part in item["loc"] if part not in FORMS)
        path = dotted(keys)
        kind, value = item["type"], item["input"]
        if kind == "extra_forbidden":
            known = _known_keys(keys[:-1], root)
            near = difflib.get_close_matches(str(keys[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            yield f"unknown key {path}; {hint}"
        elif kind == "missing":
            yield f"{path} is missing"
        elif kind == "value_error":
            prefix = f"{path}: " if path else ""
            yield f"{prefix}{item['ctx']['error']}"
        elif kind == "literal_error":
            yield f"{path} is {_shown(value)}; allowed are {item['ctx']['expected']}"
        elif kind == "bool_type":
            yield f"{path} is {_shown(value)}; allowed are true and false"
        elif kind in ("model_type", "model_attributes_type"):
            yield f"{path} is {_shown(value)}; it must hold keys: {', '.join(_known_keys(keys, root))}"
        else:
            yield f"{path} is {_shown(value)}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _shown(value: Any) -> str:
    """A value as it is told to the user, not the whole of a long one."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _known_keys(path: tuple[int | str, ...], root: type[Section]) -> list[str]:
    """Field names of the section at `path` of `root`."""
    section: Any = root
    for key in path:
        if get_origin(section) is dict:  # the key is a name that the user gave
            section = get_args(section)[1]
            continue
        if not (isinstance(section, type) and issubclass(section, Section)):
            break
        annotation = section.model_fields[str(key)].annotation
        section = annotation if get_origin(annotation) is dict else section_in(annotation)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []
