"""Whatever is given for any key of the configuration: taken, or refused with a sentence that names the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from skvr_dist.config.load import load_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.parallel.engine.deepspeed_json import require_accepted
from skvr_dist.schedule import Schedule
from skvr_dist.section import Section, section_in

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"


def leaves(section: type[Section] = Config, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key by its whole name; of sections that the user names, those of one called `code`."""
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None or inner is Schedule:
            yield path + name, field  # a schedule's key also takes a number
        if inner is not None:
            yield from leaves(
                inner, f"{path}{name}.code." if get_origin(field.annotation) is dict else f"{path}{name}."
            )


LEAVES = dict(leaves())
SCHEDULED = [path for path, field in LEAVES.items() if section_in(field.annotation) is Schedule]
RARE = st.sampled_from([".inf", "-.inf", ".nan", "1e999", "9" * 5000, "~", "{}", "[]", "{a: {b: 1}}", "[1, x]", '""'])
ANY = st.one_of(
    RARE,
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(json.dumps),
    st.text(max_size=8).map(json.dumps),
    st.lists(st.integers(-2, 2) | st.text(max_size=2), max_size=3).map(json.dumps),
    st.dictionaries(st.text(max_size=3), st.integers() | st.none(), max_size=2).map(json.dumps),
)


def load(path: str, value: str) -> str | None:
    """The sentence with which a value is refused; None if it is taken."""
    # The section of a source needs its path, and one of rope scaling its type.
    needed = {
        "data.train.code.": "data.train={code: {path: x}}",
        "data.validation.code.": "data.validation={code: {path: x}}",
        "model.rope_scaling.": "model.rope_scaling={rope_type: linear, factor: 2.0}",
    }
    needed |= {f"{key}.unit": f"{key}.points=[[0, 1]]" for key in SCHEDULED}
    needed |= {
        "train.learning_rate.": "train.learning_rate_decay=constant",
        "distillation.": "distillation.teacher=self",
    }
    first = [override for prefix, override in needed.items() if path.startswith(prefix)]
    try:
        load_config([QUICKSTART], [*first, f"{path}={value}"])
    except UserError as error:
        return str(error)
    return None


def test_there_are_many_keys() -> None:
    assert len(LEAVES) > 70


@settings(deadline=None, max_examples=300)
@given(path=st.sampled_from(sorted(LEAVES)), value=ANY)
@example(path="distillation.weight", value='{"\\n": null}')
def test_any_value_is_taken_or_refused_by_the_name_of_its_key(path: str, value: str) -> None:
    sentence = load(path, value)
    assert sentence is None or path.rpartition(".")[2] in sentence, sentence
    assert sentence is None or ("\n" not in sentence and len(sentence) < 2000)


@settings(deadline=None, max_examples=200)
@given(path=st.sampled_from(sorted(LEAVES)), at=st.integers(0, 40), letter=st.sampled_from("xq_"))
def test_misspelt_keys_are_unknown(path: str, at: int, letter: str) -> None:
    front, _, name = path.rpartition(".")
    misspelt = name[: at % (len(name) + 1)] + letter + name[at % (len(name) + 1) :]
    if f"{front}.{misspelt}" in LEAVES or front in ("evaluate.profiles", "") or name == "deepspeed":
        return
    sentence = load(f"{front}.{misspelt}", "1")
    assert sentence is not None and f"unknown key {front}.{misspelt}; " in sentence, sentence


def wrong_values(field: FieldInfo) -> list[str]:
    """Some that no key of this kind takes."""
    kinds = {field.annotation, *get_args(field.annotation)}
    of_schedule = section_in(field.annotation) is Schedule
    if of_schedule:
        kinds = {float}
    wrong = ["[[1]]", "{zz: {yy: 1}}"] if get_origin(field.annotation) is not dict else ["[[1]]", "7"]
    if float in kinds:
        wrong += [".inf", "-.inf", ".nan", "abc", "true"]
    elif int in kinds:
        wrong += ["1.5", ".inf", "abc", "true", str(10**30), str(-(10**30))]
    elif bool in kinds:
        wrong += ["1", "yess"]
    elif str in kinds:
        wrong += ["7", "true"]
    if of_schedule:
        wrong += ["-0.1", "{points: [[0, -0.1]]}", "{points: [[0, 0.1], [1.5, 0.1]]}"]
    for bound in field.metadata:
        if getattr(bound, "gt", None) is not None:
            wrong.append(str(bound.gt))
        if getattr(bound, "le", None) is not None:
            wrong.append(str(bound.le + 1))
    return wrong


@pytest.mark.parametrize("path", sorted(LEAVES))
def test_wrong_values_are_refused(path: str) -> None:
    if path == "deepspeed":
        return
    for value in wrong_values(LEAVES[path]):
        sentence = load(path, value)
        assert sentence is not None and path.rpartition(".")[2] in sentence, (value, sentence)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfet\x00r\x00", r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b"# gr\xf6sse\ntrain: {steps: 50}\n", r"is not UTF-8 text \(byte 4\)"),
        (b"train:\n  seed: 5\ntrain:\n  steps: 7\n", "key train is given twice"),
        (b"train: {seed: 5, seed: 6}", "key seed is given twice"),
        (b"5: {seed: 5}", "key 5 is not a text"),
        (b"include: 5\n", "includes 5; give a file or a list of files"),
        (b"include: [5]\n", r"includes \[5\]; give a file or a list of files"),
        (b"train: {seed: " + b"9" * 5000 + b"}", "is not valid YAML: Exceeds the limit"),
        (b"a" * 3 + b": &x [*x]", "unknown key aaa"),
        (b"{" * 3000, "is not valid YAML"),
        (b"a\0b", "is not valid YAML"),
        (b"- 1", "must hold sections, not a list"),
        (b"train: 5", "train is 5; it must hold keys: output_dir, seed"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config([QUICKSTART, file])
    with pytest.raises(UserError, match=r"cannot read .*: it is a folder"):
        load_config([tmp_path])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=4194304"], "it counts sequences, not tokens: use at most"),
        (["evaluate.profiles={full: 'prefix:1'}"], "evaluate.profiles: full is a strategy itself"),
        (["evaluate.profiles={'every:2': full}"], "evaluate.profiles: every:2 is a strategy itself"),
        (["evaluate.profiles={half: 'every:0'}"], "evaluate.profiles: cache strategy every:0 needs"),
        (["evaluate.profiles={half: 'prefix:99'}"], "evaluate.profiles: cache strategy prefix:99 is outside"),
        (["deepspeed.zero_optimization=5"], "deepspeed.zero_optimization is 5; it must hold options"),
        (["train..seed=1"], "a key is empty"),
        (
            [
                "model.rope_scaling={rope_type: llama3, factor: 8.0, low_freq_factor: 4.0, high_freq_factor: 1.0, "
                "original_max_position_embeddings: 64}"
            ],
            "low_freq_factor 4.0 must be below high_freq_factor 1.0",
        ),
    ],
)
def test_values_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([QUICKSTART], overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "zero_optimization.reduce_buket_size=1",
            "zero_optimization.reduce_buket_size; did you mean reduce_bucket_size?",
        ),
        ("zero_optimization.reduce_bucket_size=abc", "zero_optimization.reduce_bucket_size is 'abc'; input should be"),
        ("zero_optimization={offload_optimizer: {device: cpu, pin_memry: true}}", "offload_optimizer.pin_memry"),
        ("wall_clock_brekdown=true", "unknown key deepspeed.wall_clock_brekdown; did you mean wall_clock_breakdown?"),
        ("wall_clock_breakdown=7", "wall_clock_breakdown is 7; give a value like DeepSpeed's default False"),
        ("flops_profiler={profile_stepp: 3}", "flops_profiler.profile_stepp; did you mean profile_step?"),
        ("flops_profiler=3", "DeepSpeed cannot read deepspeed.flops_profiler 3"),
        ("communication_data_type=bf17", "DeepSpeed cannot read deepspeed.communication_data_type 'bf17'"),
        ("nonsense=1", "unknown key deepspeed.nonsense; known are"),
    ],
)
def test_deepspeed_refuses_before_anything_starts(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        require_accepted(load_config([QUICKSTART], [f"deepspeed.{override}"]), 4)


def test_what_deepspeed_says_of_options_together_is_said() -> None:
    config = load_config([QUICKSTART], ["parallel.pipeline=1"])
    # Which we refuse ourselves.
    config = config.model_copy(update={"deepspeed": {"zero_optimization": {"compute_grad_norm": False}}})
    with pytest.raises(UserError, match=r"deepspeed: .*compute_grad_norm"):
        require_accepted(config, 1)


def test_deepspeed_takes_its_own_options() -> None:
    overrides = [
        "deepspeed.zero_optimization={reduce_bucket_size: 1000, offload_optimizer: {device: cpu, pin_memory: true}}",
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.flops_profiler={enabled: true, profile_step: 3}",
        "deepspeed.tensorboard={enabled: false}",
        "deepspeed.comms_logger={enabled: true}",
        "deepspeed.aio={block_size: 4096}",
    ]
    require_accepted(load_config([QUICKSTART], overrides), 4)
