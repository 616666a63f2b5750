"""The configuration: what is accepted, what is refused and in which words, and the DeepSpeed JSON made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import dump_config, load_config
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/experiment/quickstart.yaml"


def quickstart(*overrides: str) -> Config:
    return load_config([QUICKSTART], overrides)


def test_overrides_and_yaml_round_trip(tmp_path: Path) -> None:
    config = quickstart(
        "train.learning_rate=1e-4", "model.num_hidden_layers=8", "routing.cross_layer_prob.points=[[0, 0.25]]"
    )
    assert config.train.learning_rate == 1e-4
    assert config.model.num_hidden_layers == 8
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config([copy]) == config


def test_truth_values_are_true_and_false_alone(tmp_path: Path) -> None:
    """YAML 1.1 also takes off, on, yes and no for them, and `off` is what a key of ours may be."""
    file = tmp_path / "later.yaml"
    file.write_text("parallel: {compile: off}\nmodel: {tie_word_embeddings: False}\n")
    assert load_config([QUICKSTART, file]).parallel.compile == "off"
    assert quickstart("parallel.compile=off").parallel.compile == "off"
    assert load_config([QUICKSTART, file]).model.tie_word_embeddings is False
    with pytest.raises(UserError, match=r"model\.tie_word_embeddings is 'yes'; allowed are true and false"):
        quickstart("model.tie_word_embeddings=yes")


def test_numbers_texts_and_merged_keys_are_those_of_files(tmp_path: Path) -> None:
    """Numbers of YAML 1.1 read otherwise (010 as 8, 1:30 as 90, dates); what is written is read back all the same."""
    file = tmp_path / "later.yaml"
    file.write_text(
        "train: {<<: {steps: 7, seed: 0o17}, steps: 0100, log_every_steps: 1_000, adam_eps: 1_0e-6, decay_steps: 0x10, "
        "output_dir: 2026-11-22, resume: '1e-4', initial_weights: '08'}"
    )
    config = load_config([QUICKSTART, file])
    train = config.train
    assert (train.steps, train.seed, train.log_every_steps, train.adam_eps) == (100, 15, 1000, 1e-5)
    assert (train.decay_steps, train.output_dir, train.resume) == (16, "2026-11-22", "1e-4")
    file.write_text(dump_config(config))
    assert load_config([file]) == config
    with pytest.raises(UserError, match=r"train\.steps is '1:30'; input should be a valid integer"):
        quickstart("train.steps=1:30")


def test_held_out_questions_stand_as_in_training() -> None:
    """Unless they say otherwise, or have no namesake."""
    overrides = [
        "data.documents=separate",
        "data.train={qa: {path: x, format: squad, question_first_prob: 0.0}, more: {path: x, format: squad}}",
        "data.validation={qa: {path: y, format: squad}, other: {path: y, format: squad}}",
    ]
    validation = load_config([QUICKSTART], overrides).data.validation
    assert [source.question_first_prob for source in validation.values()] == [0.0, 0.5]
    validation = load_config([QUICKSTART], [*overrides, "data.validation.qa.question_first_prob=1.0"]).data.validation
    assert validation["qa"].question_first_prob == 1


def test_later_files_win(tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("train: {steps: 7, warmup_steps: 2}\n")
    config = load_config([QUICKSTART, later])
    assert (config.train.steps, config.train.learning_rate) == (7, quickstart().train.learning_rate)


def test_a_schedule_takes_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Its places would be in the other's unit."""
    by_steps = "routing.cross_layer_prob={unit: steps, points: [[400, 0.0], [800, 0.5]]}"
    by_share = "routing.cross_layer_prob={points: [[0.0, 0.0], [0.5, 0.5]]}"
    later = tmp_path / "later.yaml"
    later.write_text("routing: {cross_layer_prob: {points: [[0.0, 0.0], [0.5, 0.5]]}}\n")
    earlier = tmp_path / "earlier.yaml"
    earlier.write_text("routing: {cross_layer_prob: {unit: steps, points: [[400, 0.0], [800, 0.5]]}}\n")
    assert quickstart(by_steps, by_share) == quickstart(by_share) == load_config([QUICKSTART, earlier, later])
    one_key = quickstart(by_steps, "routing.cross_layer_prob.points=[[300, 0.5]]").routing.model_dump()
    assert one_key["cross_layer_prob"] == {"unit": "steps", "points": [[300, 0.5]]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", r"unknown key train\.step; did you mean steps\?"),
        ("modle.hidden_size=5", r"unknown key modle; did you mean model\?"),
        ("model.rope_scaling={rope_type: linear, facter: 2.0}", r"model\.rope_scaling\.facter; did you mean factor\?"),
        (
            "data.train={code: {path: x, weight: {points: [[0.0, 1.0], [0.5, 0.5]]}}}",
            r"data\.train\.code\.weight: points must be level between places, but 1.0 at 0.0 .* at one place",
        ),
        (
            "data.train={code: {path: x, weight: {points: [[0.0, -1]]}}}",
            "code.weight: the values of points must be 0 or",
        ),
        ("train.steps=many", r"train\.steps is 'many'; input should be a valid integer"),
        ("train.steps=0", r"train\.steps is 0; input should be greater than 0"),
        (
            "train.learning_rate={points: [[0.0, 1.0e-3], [1.0, 0.0]]}",
            "learning_rate is a schedule, which learning_rate_decay cosine would bend; set learning_rate_decay to",
        ),
        (
            "train.learning_rate={points: [[0.0, 0.0]]}",
            "learning_rate: the values of points must be 0 or more, not all 0",
        ),
        ("train.learning_rate='1e-4'", r"train\.learning_rate is '1e-4'"),
        ("train.precision=fp16", r"train\.precision is 'fp16'; allowed are 'fp32' or 'bf16'"),
        ("routing.policy=unifrom", r"routing\.policy is 'unifrom'; allowed are 'none', 'uniform'"),
        ("routing.cross_layer_prob=1.5", r"cross_layer_prob is 1\.5"),
        ("routing.cross_layer_prob=null", "policy strategy needs cross_layer_prob"),
        (
            "routing.cross_layer_prob={points: []}",
            r"routing\.cross_layer_prob\.points is \[\]; list should have at least 1",
        ),
        (
            "routing.cross_layer_prob={points: [[0.5, 0.1], [0.2, 0.5]]}",
            "prob: points must be in ascending order, .* 0.2",
        ),
        (
            "routing.cross_layer_prob={points: [[0.0, 0.1], [1.5, 0.5]]}",
            "prob: points lie at a share from 0 to 1 .* 1.5",
        ),
        (
            "routing.cross_layer_prob={unit: steps, points: [[-1, 0.1]]}",
            "points lie at 0 to 1000000000 steps, .* -1.0",
        ),
        ("routing.cross_layer_prob={points: [[0.0, 1.1]]}", "prob: the values of points must be from 0 to 1, .* 1.1"),
        ("routing.cross_layer_prob={points: [[0.0, .nan]]}", "cross_layer_prob.points.0.1 is nan; .* finite"),
        ("routing.cross_layer_prob={points: [[0.0, 0.1, 0.2]]}", "prob.points: a point is a pair .* has 3 numbers"),
        ("routing.cross_layer_prob={points: [[0, 0], [0, 0.1], [0, 0.2]]}", "two values at one place, a jump, but 0.0"),
        (
            "routing.cross_layer_prob={point: [[0, 0]]}",
            r"unknown key routing\.cross_layer_prob\.point; did you mean points",
        ),
        (
            "routing.cross_layer_prob={points: [[0, 0]], unit: day}",
            r"prob\.unit is 'day'; allowed are 'share' or 'steps'",
        ),
        ("routing={policy: cla, cross_layer_prob: null, group_size: 2, full_retention_share: 0.5}", "set it to 0"),
        ("routing={policy: cla, group_size: 2, cross_layer_prob: null, draws_per: sequence}", "set it to micro_batch"),
        ("routing.draws_per=token", r"routing\.draws_per is 'token'; allowed are 'micro_batch' or 'sequence'"),
        ("routing.full_retention_share=1.5", "routing.full_retention_share is 1.5; .* less than or equal to 1"),
        ("routing.policy=none", "policy none takes no parameters, but cross_layer_prob is 0.5"),
        ("routing.policy=window", "policy window needs window"),
        ("routing={policy: window, window: 9999999999}", "window is 9999999999; .* less than or equal to 1000000000"),
        ("parallel.pipeline=9", "parallel.pipeline is 9, but model.num_hidden_layers is 8"),
        ("parallel.stage_layers=[6, 5]", r"\[6, 5\] must be 2 positive counts .* add up to 8"),
        ("parallel.zero_stage=4", "zero_stage is 4; allowed are 0, 1, 2 or 3"),
        ("parallel.zero_stage=2", "zero_stage 2 under a pipeline: .* use zero_stage 1 or 3, or parallel.pipeline 1"),
        ("parallel.tensor=3", "num_attention_heads 4 cannot be split over parallel.tensor 3 ranks; use a divisor of 4"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor of at least 2, got 1"),
        ("train.micro_batch_size=3", "is not a multiple of train.micro_batch_size 3; near ones: 3 and 6"),
        ("data.sequence_length=4096", "longer than model.max_position_embeddings 2048"),
        ("train.warmup_steps=100000", "train: warmup_steps 100000 exceeds train.steps 1100"),
        ("train.schedule_steps=30", "train: warmup_steps 40 exceeds train.schedule_steps 30"),
        (
            "train.decay_steps=1061",
            "decay_steps 1061 after warmup_steps 40 from step 0 .*steps 1100; the most is 1060",
        ),
        (
            "train={decay_steps: 9, learning_rate_decay: constant}",
            "decay_steps is 9, but learning_rate_decay is constant",
        ),
        (
            "train.learning_rate_from_step=1070",
            "learning_rate_from_step 1070 and warmup_steps 40 leave none of train.steps",
        ),
        ("train.learning_rate_decay=exp", "learning_rate_decay is 'exp'; allowed are 'cosine', 'linear' or 'constant'"),
        ("train.on_resume=other", "train.on_resume is 'other'; allowed are 'same_schedule' or 'other_schedule'"),
        ("evaluate.strategies=['1,2']", "does not retain layer 0"),
        ("deepspeed.gradient_clipping=1.0", "cannot be passed through; set train.gradient_clipping"),
        ("deepspeed.zero_optimization={stage: 2}", "zero_optimization.stage cannot be .* set parallel.zero_stage"),
        ("deepspeed.zero_optimization={offload_optimizer: {device: nvme}}", "device is nvme, .* use cpu"),
        ("deepspeed.steps_per_print=0", "steps_per_print is 0, by which DeepSpeed divides; leave it out"),
        ("deepspeed.zero_force_ds_cpu_optimizer=true", "runs train with torch's AdamW; leave it out"),
        ("train.micro_batch_size=8", "4 is not a multiple of train.micro_batch_size 8; near ones: 8"),
        ("deepspeed.zero_optimization.round_robin_gradients=true", "round_robin_gradients true makes DeepSpeed take"),
        (
            "deepspeed.zero_optimization.cpu_offload=true",
            "set deepspeed.zero_optimization.offload_optimizer={device: cpu}",
        ),
        (
            "deepspeed.zero_optimization={offload_optimizer: {device: cpu, ratio: 0.5}}",
            "offload_optimizer.ratio is 0.5",
        ),
        (
            "deepspeed.zero_optimization.compute_grad_norm=false",
            "compute_grad_norm cannot be passed through; every step",
        ),
        ("deepspeed.torch_autocast={enabled: true}", "torch_autocast cannot be passed through; set train.precision"),
        ("deepspeed.gradient_allreduce_op=sum", "gradient_allreduce_op cannot be passed through; gradients are means"),
        ("deepspeed.prescale_gradients=true", "prescale_gradients cannot be passed through; gradients are means"),
        ("deepspeed.tensor_parallel={autotp_size: 2}", "tensor_parallel cannot be passed through; set parallel.tensor"),
        ("deepspeed.pipeline={activation_checkpoint_interval: 1}", "deepspeed.pipeline cannot be passed through"),
        ("model.attention=flash", "flash works in bf16 only"),
        ("model.num_key_value_heads=3", "must be a multiple of num_key_value_heads 3"),
        ("model.qk_norm=false", "architecture qwen3 is published with"),
        ("model={architecture: qwen2, qk_norm: false}", "attention_bias is false, but architecture qwen2 is published"),
        ("train.steps", "must look like section.key=value"),
    ],
)
def test_refused_with_a_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quickstart(override)


def test_missing_section_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model is missing"):
        load_config([ROOT / "configs/parallel/pp2.yaml"])
    with pytest.raises(UserError, match=r"cannot read configuration .*absent\.yaml: No such file"):
        load_config([tmp_path / "absent.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [unclosed")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config([broken])
    itself = tmp_path / "itself.yaml"
    itself.write_text("include: [itself.yaml]")
    with pytest.raises(UserError, match="includes itself"):
        load_config([itself])
    (tmp_path / "circle.yaml").symlink_to("circle.yaml")
    with pytest.raises(UserError, match=r"cannot read configuration .*circle\.yaml: Too many levels of symbolic links"):
        load_config([tmp_path / "circle.yaml"])


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (3, [], "3 ranks cannot hold parallel.pipeline 2 stages x .* 1 ranks; start a multiple of 2 ranks"),
        (12, [], "replicas cannot share equally; make the batch a multiple of"),
        (
            4,
            ["data.lanes=12", "train.micro_batch_size=4", "train.global_batch_size=16"],
            "data.lanes 12 must be a multiple of",
        ),
    ],
)
def test_world_sizes_that_do_not_fit(ranks: int, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_parallel_size(quickstart(*overrides), ranks)


def test_deepspeed_json() -> None:
    config = quickstart("train.global_batch_size=32", "train.micro_batch_size=4", "deepspeed.wall_clock_breakdown=true")
    generated = deepspeed_json(config, world_size=4)
    assert generated["train_batch_size"] == 32
    assert generated["gradient_accumulation_steps"] == 32 // 4 // 2
    assert generated["zero_optimization"] == {"stage": 1}
    assert generated["wall_clock_breakdown"] is True
    passed = deepspeed_json(quickstart("deepspeed.zero_optimization={reduce_bucket_size: 1000}"), 4)
    assert passed["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 1}


def test_gradients_are_reduced_in_fp32_unless_asked_otherwise() -> None:
    assert "communication_data_type" not in deepspeed_json(quickstart("train.precision=fp32"), 4)
    assert deepspeed_json(quickstart("train.precision=bf16"), 4)["communication_data_type"] == "fp32"
    asked = deepspeed_json(quickstart("train.precision=bf16", "deepspeed.communication_data_type=bf16"), 4)
    assert asked["communication_data_type"] == "bf16"


def test_an_offloaded_optimizer_is_torchs() -> None:
    key = "deepspeed.zero_optimization={offload_optimizer: {device: %s}}"
    assert deepspeed_json(quickstart(key % "cpu"), 4)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(UserError, match=r"offload_optimizer has no effect at parallel\.zero_stage 0; use 1, 2 or 3"):
        quickstart(key % "cpu", "parallel.zero_stage=0")


# Parameters as published with the weights, rounded to a million.
PUBLISHED = {
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-8b": 8191,
    "qwen2.5-0.5b": 494,
    "llama-3.1-8b": 8030,
    "llama-3.1-70b": 70554,
    "mistral-7b": 7248,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset: str) -> None:
    import torch
    import yaml

    from skvr_dist.model.decoder import Decoder

    model = ModelConfig.model_validate(yaml.safe_load((ROOT / f"configs/model/{preset}.yaml").read_text())["model"])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(model).parameters())
    assert round(parameters / 1e6) == PUBLISHED[preset]


def test_a_configuration_with_a_retired_key_still_loads() -> None:
    assert quickstart("parallel.verify_plan_every_steps=7") == quickstart()


def test_the_published_settings_fit_every_model() -> None:
    """`paper-pretrain` and `paper-finetune`, over each model preset, as arXiv 2604.22782 has them (section 4)."""
    experiments = ROOT / "configs/experiment"
    for model in sorted((ROOT / "configs/model").glob("[!t]*.yaml")):
        pretraining = load_config([model, experiments / "paper-pretrain.yaml"])
        train = pretraining.train
        assert (pretraining.routing.policy, train.gradient_clipping) == ("uniform", 0.1)
        assert train.steps * train.global_batch_size * pretraining.data.sequence_length == pytest.approx(34e9, rel=1e-4)
        assert train.warmup_steps / train.steps == pytest.approx(0.05, rel=1e-3)
        finetuning = load_config([model, experiments / "paper-finetune.yaml"], ["data.tokenizer=x"])
        assert finetuning.train.warmup_steps / finetuning.train.steps == 0.015
        assert set(finetuning.data.train) == set(finetuning.data.validation) and len(finetuning.data.train) == 5
