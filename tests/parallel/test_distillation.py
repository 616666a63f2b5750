"""Distillation: from a frozen teacher in several layouts, after resuming, step by step, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.datasets import CODE, TOKENIZER

from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import Checkpoint, partial_folder, publish, step_folder, write_facts
from skvr_dist.checkpoint.pieces import WEIGHTS, Piece
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.config.distillation import DistillationConfig
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import dump_config, load_config, validate_config
from skvr_dist.config.stored import StoredConfig
from skvr_dist.config.tree import Config
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.lab.verify import draws, reference
from skvr_dist.lab.verify.cases import LAYOUTS, MICRO_BATCHES, SEED, Case
from skvr_dist.lab.verify.compare import how_to_train
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.lab.verify.reshard import Trainer, checkpoint_of
from skvr_dist.parallel.engine.teacher import open_teacher, require_teachers_tokenizer
from skvr_dist.parallel.pipeline.passes import Role
from skvr_dist.train.passes import passes_of_step
from skvr_dist.train.resume import _require_same_distillation
from skvr_dist.train.state import load_state

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"
# Another size than the model's, and as few layers as the deepest pipeline here has stages.
TEACHER = {**Case("single").shape, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 4}
FROZEN = {"weight": 0.6, "temperature": 3.0, "passes": ["full", "routed"]}


def quickstart(*overrides: str) -> Config:
    return load_config([QUICKSTART], overrides)


def write_teacher(folder: Path) -> Path:
    """A checkpoint of a teacher's weights alone."""
    partial = folder / partial_folder(1)
    partial.mkdir(parents=True)
    config = Case("single").config().model_dump()
    write_facts(
        partial,
        config_text=dump_config(validate_config({**config, "model": TEACHER})),
        facts=Facts(step=1, tokens_seen=0),
        files={},
    )
    weights = draws.initial_weights(TEACHER, SEED + 1)
    pieces = {WEIGHTS + name: [Piece(tuple(t.shape), (0,) * t.dim(), t)] for name, t in weights.items()}
    publish(partial, folder / step_folder(1), write_pieces(partial, pieces))
    return folder / step_folder(1)


def train_with_teacher(case: Case, teacher: str) -> dict[str, Any]:
    """Losses, norms and parts of the losses of a few steps; and the bytes that the first step sent."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.plans import plan_of_step

    distillation = DistillationConfig(teacher=teacher, **cast(Any, FROZEN))
    config = case.config().model_copy(update={"distillation": distillation})
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    found: dict[str, Any] = {"losses": [], "norms": [], "parts": []}
    for step, batch in enumerate(case.micro_batches()):
        loss = engine.train_step(iter(batch[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step))
        found["losses"].append(loss)
        found["norms"].append(engine.gradient_norm)
        found["parts"].append(engine.losses_by_part)
    engine.destroy()
    gc.collect()
    return found


@pytest.mark.parametrize("layout", ["DP2 ZeRO-3", "TP2xPP2"])
def test_a_frozen_teacher_of_another_size(layout: str, tmp_path: Path) -> None:
    case = Case(layout, "strategy", ragged=True)
    teacher = write_teacher(tmp_path)
    plans = [draws.plan(case.routing, 5, MICRO_BATCHES, seed=SEED, step=t, steps=case.steps) for t in range(case.steps)]
    wanted = reference.train(
        draws.initial_weights(case.shape, SEED),
        case.shape,
        case.batches(),
        plans,
        labelled=case.labelled(),
        distillation=reference.Distillation(
            0.6, 3.0, 0.0, [list(range(5)), None], (draws.initial_weights(TEACHER, SEED + 1), TEACHER)
        ),
        distilled=[[True] * MICRO_BATCHES] * case.steps,
        **how_to_train(case),
    )
    for found in run_ranks(LAYOUTS[layout].ranks, train_with_teacher, case, str(teacher)):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        for loss, parts in zip(found["losses"], found["parts"], strict=True):  # both students are in one part
            assert parts.keys() == {"routed", "divergence"}
            assert 0.4 * parts["routed"] + 0.6 * 9 * parts["divergence"] == pytest.approx(loss, rel=1e-6)


def train_in_one_go(case: Case, folder: str) -> list[float]:
    trainer = Trainer(case, folder)
    losses = trainer.train(range(1))
    trainer.save(1)
    return losses + trainer.train(range(1, 3))


def train_from_the_middle(case: Case, folder: str, again: str) -> list[float]:
    trainer = Trainer(case, again)
    load_state(trainer.engine, Checkpoint(checkpoint_of(folder, 1)))
    return trainer.train(range(1, 3))


def test_a_resumed_run_distils_the_micro_batches_whose_turn_it_is(tmp_path: Path) -> None:
    """Half of them in each step; in another layout."""
    one, other = (Case(layout, distillation="forwards only") for layout in ("single", "DP2 ZeRO-1"))
    (losses,) = run_ranks(1, train_in_one_go, one, str(tmp_path / "one"))
    for found in run_ranks(2, train_from_the_middle, other, str(tmp_path / "one"), str(tmp_path / "other")):
        assert found == pytest.approx(losses[1:], rel=1e-6)


def test_micro_batches_take_turns_and_weights_add_up_to_one() -> None:
    config = quickstart(
        "train.global_batch_size=24", "train.micro_batch_size=4", "train.steps=10", "train.warmup_steps=0",
        "distillation={teacher: self, share: 0.6666666666666667, full_weight: 2.0, passes: [routed, every:2],"
        " weight: {points: [[0.0, 0.0], [1.0, 1.0]]}}",
    )  # fmt: skip
    assert (config.num_micro_batches, config.num_distilled, config.num_passes) == (6, 4, 14)
    marks = [[len(passes) == 3 for passes in passes_of_step(config, step)] for step in range(3)]
    assert marks == [[True] * 4 + [False] * 2, [True, True, False, False, True, True], [False, False] + [True] * 4]
    target, routed, thin = passes_of_step(config, 5)[2]
    assert (target.role, target.weight, target.runs_back) == (Role.TARGET, 0.5, True)
    assert target.donors == tuple(range(config.model.num_hidden_layers))
    assert (routed.donors, routed.weight, routed.divergence) == (None, 0.25, 0.5)
    assert thin.donors == (0, 0, 2, 2, 4, 4, 6, 6)[: config.model.num_hidden_layers]
    for replicas in (1, 2):
        assert data_parallel_size(config, 2 * replicas) == replicas


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation={weight: 0.5}"], r"distillation\.teacher is missing"),
        (["distillation={teacher: self, weight: 1.5}"], r"distillation\.weight is 1\.5"),
        (["distillation={teacher: self, temperature: 0}"], r"distillation\.temperature is 0"),
        (["distillation={teacher: self, passes: [routed, full]}"], "passes names full, which teacher self runs"),
        (["distillation={teacher: self, passes: [routed, routed]}"], r"passes \['routed', 'routed'\] must name each"),
        (["distillation={teacher: self, passes: [rooted]}"], r"passes: cannot read .*'rooted'.* or routed"),
        (["distillation={teacher: self, weight: 0, full_weight: 0}"], "leave nothing to learn from the pass at full"),
        (
            ["distillation={teacher: self, share: 0.3}", "train.global_batch_size=16", "train.micro_batch_size=4"],
            r"distillation\.share 0\.3 of the 4 micro-batches of a step is 1\.2; .* such as 1 / 4 = 0\.25",
        ),
        (
            ["distillation={teacher: self}", "routing={policy: none, cross_layer_prob: null}"],
            r"routing\.policy none draws no donors, so that the routed pass is the full one; choose another policy",
        ),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quickstart(*overrides)


def test_replicas_must_share_distilled_micro_batches() -> None:
    batch = ["train.global_batch_size=16", "train.micro_batch_size=4"]
    config = quickstart(*batch, "distillation={teacher: self, share: 0.25}")
    with pytest.raises(UserError, match=r"makes 1 of 4 micro-batches distilled, which 2 replicas .* such as 0\.5"):
        data_parallel_size(config, 4)


def test_shares_that_refusals_name_will_do() -> None:
    batch = ["train.global_batch_size=12", "train.micro_batch_size=1", "parallel.pipeline=1"]
    with pytest.raises(UserError, match=r"such as 1 / 12 = 0\.0833333"):
        quickstart(*batch, "distillation={teacher: self, share: 0.1}")
    assert quickstart(*batch, "distillation={teacher: self, share: 0.0833333}").num_distilled == 1
    with pytest.raises(UserError, match=r"replicas .* such as 0\.333333"):
        data_parallel_size(quickstart(*batch, "distillation={teacher: self, share: 0.25}"), 2)
    assert data_parallel_size(quickstart(*batch, "distillation={teacher: self, share: 0.333333}"), 2) == 2


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = write_teacher(tmp_path)
    case = Case("single").config()

    def config(**changes: Any) -> Config:
        model = case.model.model_copy(update=changes)
        return case.model_copy(update={"model": model, "distillation": DistillationConfig(teacher=str(teacher))})

    assert open_teacher(config()) is not None
    with pytest.raises(UserError, match="has a vocabulary of 97 tokens, the model one of 98; give a teacher with"):
        open_teacher(config(vocab_size=98))
    long = config().model_copy(update={"data": case.data.model_copy(update={"sequence_length": 256})})
    with pytest.raises(UserError, match=r"made for 128 positions, but data\.sequence_length is 256; lower it"):
        open_teacher(long)
    deep = config().model_copy(update={"parallel": case.parallel.model_copy(update={"pipeline": 4})})
    with pytest.raises(UserError, match=r"cannot be laid out as the model is: parallel\.pipeline is 4, but model\.num"):
        open_teacher(deep)
    with pytest.raises(UserError, match="nowhere"):
        open_teacher(case.model_copy(update={"distillation": DistillationConfig(teacher="nowhere")}))
    require_teachers_tokenizer(config(), TOKENIZER)  # it has none
    monkeypatch.setattr(Checkpoint, "tokenizer_file", tmp_path / "tokenizer.model")
    TOKENIZER.save(tmp_path / "tokenizer.model")
    require_teachers_tokenizer(config(), TOKENIZER)
    other = train_tokenizer(CODE[:2], vocab_size=500)
    with pytest.raises(UserError, match=r"to which tokens of data\.tokenizer .* are other texts; give a teacher"):
        require_teachers_tokenizer(config(), other)


def test_resuming_with_another_loss_is_a_named_choice() -> None:
    there = StoredConfig.model_validate(quickstart("distillation={teacher: self, weight: 0.5}").model_dump())
    checkpoint = cast(Checkpoint, SimpleNamespace(folder="F", step=3, config=there))
    _require_same_distillation(checkpoint, quickstart("distillation={teacher: self}"))
    for override, message in (
        ("distillation={teacher: self, weight: 0.25}", r"has distillation\.weight 0\.5, the configuration 0\.25; give"),
        ("distillation=null", r"has distillation\.teacher self, the configuration None; .*on_resume=other_schedule"),
    ):
        with pytest.raises(UserError, match=message):
            _require_same_distillation(checkpoint, quickstart(override))
        _require_same_distillation(checkpoint, quickstart(override, "train.on_resume=other_schedule"))
