"""Many strategies measured at once, and the layers that a plan keeps."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import write_dataset
from support.gguf_models import MODELS, write

from skvr_dist.commands import plan_cache
from skvr_dist.config.model import ModelConfig
from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.cache_plan import PLAN_FILE, Profile, named_strategies, plan_caches, profiles_of
from skvr_dist.evaluate.curve import HeldOutData
from skvr_dist.evaluate.intervals import Bootstrap
from skvr_dist.evaluate.overlap import shared_share
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.evaluate.search import Room, Search, one_shot
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.model.modules import token_cross_entropy
from skvr_dist.routing import CacheStrategy

LAYERS = 6


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """One whose layers differ in what they are worth: of weights so large that no layer is close to the identity."""
    config = ModelConfig(
        architecture="qwen3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        qk_norm=True,
        tie_word_embeddings=False,
    )
    decoder = Decoder(config)
    initialize(decoder, seed=1)
    return decoder


def batches(seed: int, separate_at: int | None = 0) -> list[MicroBatch]:
    drawn = torch.randint(64, (6, 25), generator=torch.Generator().manual_seed(seed))
    return [MicroBatch.of(rows, separate_at) for rows in drawn.split(4)]


ALL = [CacheStrategy(LAYERS, retained) for size in range(1, LAYERS + 1) for retained in Room(LAYERS).sets(size)]


@pytest.mark.parametrize("separate_at", [None, 0])
def test_shared_layers_give_what_each_strategy_gives_alone(decoder: Decoder, separate_at: int | None) -> None:
    text = batches(2, separate_at)
    tree = PrefixTree(decoder, text)
    tree.keep(CacheStrategy.parse("0,2,3", LAYERS), below=4)
    for strategy, losses in zip(ALL, tree.token_losses(ALL), strict=True):
        with torch.inference_mode():
            alone = [
                token_cross_entropy(decoder(b.tokens, strategy.kv_source_layers, documents=b.documents), b.labels)
                for b in text
            ]
        assert torch.equal(losses.flatten(), torch.cat(alone))


def test_a_curve_costs_the_tree_of_its_donors(decoder: Decoder) -> None:
    tree = PrefixTree(decoder, batches(2))
    tree.token_losses(ALL)
    assert tree.evaluated_layers == 2**LAYERS - 1  # instead of 6 * 32
    tree.token_losses([CacheStrategy.parse(spec, LAYERS) for spec in ("full", "prefix:3", "0,1,2")])
    assert tree.evaluated_layers == 2**LAYERS - 1 + LAYERS + 3  # they part at layer 3; two of them are the same
    before = tree.evaluated_layers
    tree.keep(CacheStrategy.full(LAYERS), below=5)
    tree.token_losses([CacheStrategy.parse("0,1,2,3,4", LAYERS)])
    assert tree.evaluated_layers == before + 5 + 1


def test_elimination_and_swaps_find_good_sets_with_half_of_the_layers(decoder: Decoder) -> None:
    room, text = Room(LAYERS), batches(3)
    every = Search(decoder, text)
    search = Search(decoder, text)
    reached = search.eliminate(room, 1)
    sets_tried = sum(len(retained) - 1 for retained in reached.values())
    assert len(search.measured) < sets_tried + 1  # it is lazy
    assert search.evaluated_layers <= 0.55 * LAYERS * (sets_tried + 1)
    for size in range(1, LAYERS + 1):
        losses = every.measure(list(room.sets(size)))
        found = every.measure([search.swap(room, reached[size], rounds=5)])[0]
        assert found <= min(losses) + 0.1 * (np.median(losses) - min(losses)) + 1e-12, size
        assert every.measure([every.exhaust(room, size)]) == [min(losses)]


def test_a_room_bounds_what_is_searched(decoder: Decoder) -> None:
    room, search = Room(LAYERS, required=(3,), last=4), Search(decoder, batches(3))
    for retained in [*search.eliminate(room, 2).values(), search.swap(room, (0, 1, 3), 2), one_shot(search, room, 3)]:
        assert {0, 3} <= set(retained) <= {0, 1, 2, 3, 4}
    with pytest.raises(UserError, match="layer 5 is to keep its cache, but only layers 0 to 4 may"):
        Room(LAYERS, required=(5,), last=4)
    with pytest.raises(UserError, match="the last layer with a cache, 6, must be one of the model's: 0 to 5"):
        Room(LAYERS, last=6)


@pytest.mark.parametrize("most", [0, 512])
def test_a_plan_is_judged_on_the_test_text(decoder: Decoder, most: int) -> None:
    profiles = [Profile("half", 3), Profile("fast-prefill", 3, last=2)]
    texts = {"a": batches(3), "b": batches(4)}, {"a": batches(5), "b": batches(6)}
    plan = plan_caches(decoder, *texts, profiles, most_to_exhaust=most)
    assert named_strategies(plan)["fast-prefill-a"] == "0,1,2"
    best = {name: Search(decoder, batches(seed)).exhaust(Room(LAYERS), 3) for name, seed in (("a", 3), ("b", 4))}
    half = {planned.calibration: planned for planned in plan.profiles if planned.profile.name == "half"}
    assert {name: planned.retained for name, planned in half.items()} == best
    on_a = half["a"].tested["a"]
    assert on_a.loss - plan.full_loss["a"] == pytest.approx(on_a.rise.mean)
    even = half["a"].rivals["evenly spaced"]
    assert even.retained == [(0, 2, 4)]
    assert even.gain["a"].mean == pytest.approx(even.loss["a"] - on_a.loss)
    assert "evenly spaced" not in plan.profiles[1].rivals  # it would use layer 4
    front = list(plan.front["a"].items())
    assert [size for size, _ in front] == sorted({len(point.retained) for _, point in front})
    losses = [point.calibration_loss for _, point in front]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
    assert min(point.calibration_loss for size, point in front if size <= 3) <= half["a"].calibration_loss
    with pytest.raises(UserError, match="profile x keeps 4 layers, but 1 must and 3 may"):
        plan_caches(decoder, {"a": batches(3)}, {"a": batches(5)}, [Profile("x", 4, last=2)])


def test_intervals_draw_whole_documents() -> None:
    """Their width is that of the documents' means; tokens of a document do not count as evidence of their own."""
    rng = np.random.default_rng(0)
    of_documents = rng.normal(2.0, 0.5, size=(40, 2))
    documents = torch.tensor([[0] * 10 + [1] * 10] * 40)
    labels = torch.zeros(40, 20, dtype=torch.long)
    labels[:, 10] = IGNORED
    losses = torch.tensor(of_documents).repeat_interleave(10, dim=1)
    losses[:, 10] = 0.0
    text = [MicroBatch(labels, labels, documents)]
    interval = Bootstrap(text).mean(losses)
    tokens = np.tile([10, 9], (40, 1))
    mean = (of_documents * tokens).sum() / tokens.sum()
    error = (tokens * (of_documents - mean)).std() * np.sqrt(80) / tokens.sum()
    assert interval.mean == pytest.approx(mean)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert Bootstrap(text).mean(losses - losses) == (0.0, 0.0, 0.0)


def test_a_text_inside_another_is_seen(tmp_path: Path) -> None:
    documents = [[[int(token) for token in np.random.default_rng(n).integers(1, 64, size=300)]] for n in range(4)]
    both = [
        HeldOutData([write_dataset(tmp_path / name, chosen)], 96, False).batches(None, 1, "cpu")
        for name, chosen in (("one", documents[:2]), ("two", documents[1:]))
    ]
    assert 0.2 < shared_share(*both) < 0.8
    assert shared_share(both[0], batches(1)) == 0.0


def test_the_profiles_of_a_checkpoint_are_the_runs_own_before_its_plans(tmp_path: Path) -> None:
    """Reports name the layers that exports serve."""
    assert profiles_of(tmp_path, {"bulk": "0"}) == {"bulk": "0"}
    (tmp_path / PLAN_FILE).write_text('{"profiles": {"bulk": "0,1", "standard": "0,2"}}')
    assert profiles_of(tmp_path, {"bulk": "0"}) == {"bulk": "0", "standard": "0,2"}
    for text in ("{", "{}", "[]"):
        (tmp_path / PLAN_FILE).write_text(text)
        with pytest.raises(UserError, match=r"cache-plan\.json is no plan of tools/plan_cache\.py; make it again, or"):
            profiles_of(tmp_path, {})


@pytest.mark.parametrize("layers", [6, 12, 24, 30, 36])
def test_a_third_of_the_layers_is_one(layers: int) -> None:
    shares = dict(text.split("=") for text in plan_cache.USUAL_PROFILES)
    assert plan_cache.profile_of("standard", shares["standard"], layers, None).size == layers // 3
    assert plan_cache.profile_of("mine", "0.2", layers, None).size == layers // 5
    for wrong in ("1/0", "nan", "third", "4/3", "0"):
        with pytest.raises(UserError, match=f"profile mine={wrong} must name a share"):
            plan_cache.profile_of("mine", wrong, layers, None)


def test_the_command_takes_budgets_and_keeps_every_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.gguf", MODELS["llama"])
    import_model(str(tmp_path / "model.gguf"), tmp_path / "model", check=False)
    tokenizer = load_tokenizer(next((tmp_path / "model").rglob("tokenizer.json")))
    for seed, name in enumerate(("one", "other")):
        drawn = torch.randint(200, (40, 30), generator=torch.Generator().manual_seed(seed)).tolist()
        write_dataset(tmp_path / name, [drawn], tokenizer)

    def planned(*more: str) -> str:
        words = [f"{tmp_path}/model", "--calibrate", f"{tmp_path}/one", "--test", f"{tmp_path}/other"]
        words += ["--sequence-length", "16", "--sequences", "8", "--test-sequences", "8", *more]
        monkeypatch.setattr(sys, "argv", ["skvr-plan-cache", *words])
        assert plan_cache.run() == 0
        return capsys.readouterr().out

    # A budget is what there may be at most, be it of all layers or of those up to one.
    for last, kept in (([], "0,1,2"), (["--last", "1"], "0,1")):
        out = planned("--budget", "1000000", *last)
        assert f" | {kept} " in out and out.endswith("OUT carries the profiles\n")
    assert planned("--budget", "1000000", "--json", f"{tmp_path}/mine.json").endswith(
        f"written: {tmp_path}/mine.json\n"
    )
    with pytest.raises(UserError, match="--profile a=1: there is another profile a; give one of both another name"):
        planned("--profile", "a=0.5", "--profile", "a=1")
    (tmp_path / "one").rename(tmp_path / "rate=1")
    again = ["--budget", "1000000", "--json", f"{tmp_path}/none.json", "--calibrate"]
    for name, text in (("rate=1", f"{tmp_path}/rate=1"), ("code", f"code={tmp_path}/rate=1")):
        assert f"searched on {name}:" in planned(*again, text)
    monkeypatch.chdir(tmp_path)
    assert "searched on rate=1:" in planned(*again, "rate=1")
    with pytest.raises(SystemExit):
        planned("--most-rise", "nan")
    (tmp_path / "none.json").unlink()
    (tmp_path / "rate=1").rename(tmp_path / "one")
    monkeypatch.setattr("skvr_dist.evaluate.cache_plan._Text.loss", lambda *_: math.nan)
    with pytest.raises(UserError, match="step-00000000 has a held-out loss of nan at full; give a checkpoint"):
        planned("--json", f"{tmp_path}/none.json")
    assert not (tmp_path / "none.json").exists()
