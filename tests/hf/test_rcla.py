"""`enable_rcla`: gradients of routed fine-tuning under other people's trainers, against the plain reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.hf_models import load_into, random_weights, shape_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from skvr_dist.errors import UserError
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.hf.convert.weights import hf_name
from skvr_dist.hf.model.rcla import disable_rcla, enable_rcla
from skvr_dist.lab.verify import reference
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.routing import RoutingConfig, draw_plan

LAYERS, BATCH, SEQUENCE, SEED = 8, 2, 12, 3
TOLERANCE = 1e-5


@cache
def shape(architecture: str) -> Any:
    biased = architecture in ("llama", "qwen2")
    return shape_of(architecture, attention_bias=biased, tie_word_embeddings=architecture == "mistral")


def initial_weights(architecture: str) -> dict[str, Tensor]:
    """Small enough that float32 rounding stays well below the tolerance."""
    return random_weights(shape(architecture), scale=0.1)


def plain_model(architecture: str) -> Any:
    """A model of transformers, not one of ours."""
    model = AutoModelForCausalLM.from_config(hf_config(shape(architecture), torch.float32, {}))
    assert type(model).__module__.startswith("transformers.")
    return load_into(model, initial_weights(architecture)).train()


def tokens(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 101, (BATCH, SEQUENCE + 1), generator=generator) for _ in range(count)]


def donors(number: int, policy: str = "uniform", prob: float = 0.6) -> list[int]:
    routing = RoutingConfig(policy=policy, cross_layer_prob=prob)  # type: ignore[arg-type]
    plan = draw_plan(routing, num_layers=LAYERS, num_micro_batches=1, seed=SEED, step=number)
    return plan.donors[0].tolist()


def reference_gradients(architecture: str, batches: list[Tensor], plans: list[list[int]]) -> dict[str, Tensor]:
    """Of the mean loss over the batches."""
    weights = {name: w.requires_grad_() for name, w in initial_weights(architecture).items()}
    fields = shape(architecture).model_dump()
    losses = [reference.loss(weights, fields, batch, plan) for batch, plan in zip(batches, plans, strict=True)]
    torch.stack(losses).mean().backward()
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}


def assert_close(found: Tensor, wanted: Tensor, name: str, scale: float) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE * scale, name


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Each within the tolerance, as a share of its own largest element or, for tiny ones, of a thousandth of all."""
    largest = max(float(w.abs().max()) for w in wanted.values())
    for name, gradient in wanted.items():
        assert_close(found[hf_name(name)], gradient, name, max(float(gradient.abs().max()), 1e-3 * largest))


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter has one, also where routing left it out."""
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "non-reentrant", "reentrant"])
def test_gradients(architecture: str, checkpointing: bool | None) -> None:
    model = plain_model(architecture)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    batches = tokens(3)
    for batch in batches:
        (model(batch, labels=batch).loss / 3).backward()
    plans = [donors(number) for number in range(3)]
    assert any(set(plan) != set(range(LAYERS)) for plan in plans)  # some projections are left out
    assert_gradients(gradients(model), reference_gradients(architecture, batches, plans))


def test_the_policy_of_inference_and_going_on() -> None:
    model = plain_model("qwen3")
    draw = enable_rcla(model, cross_layer_prob=0.5, seed=SEED, policy="strategy")
    draw.passes = 7
    batch = tokens(1)[0]
    model(batch, labels=batch).loss.backward()
    plan = donors(7, "strategy", 0.5)
    assert_gradients(gradients(model), reference_gradients("qwen3", [batch], [plan]))


def test_evaluation_and_disabling_change_nothing() -> None:
    model, batch = plain_model("llama"), tokens(1)[0]
    wanted = model(batch).logits
    answer = model.generate(batch, max_new_tokens=8, do_sample=False)
    draw = enable_rcla(model, seed=SEED)
    assert not torch.equal(model(batch).logits, wanted)
    assert torch.equal(model.generate(batch, max_new_tokens=8, do_sample=False), answer)  # of a model in training mode
    assert torch.equal(model.eval()(batch).logits, wanted)
    assert draw.passes == 1
    disable_rcla(model)
    assert torch.equal(model.train()(batch).logits, wanted)
    names = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "LlamaAttention"} <= names  # by which FSDP policies find them


def test_a_model_that_accelerate_placed(tmp_path: Path) -> None:
    """Its modules hold their forwards of before."""
    plain_model("mistral").save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{number}": "disk" if number == 3 else "cpu" for number in range(LAYERS)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "disk", dtype=torch.float32
    ).train()
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    batch = tokens(1)[0]
    weights = initial_weights("mistral")
    wanted = reference.loss(weights, shape("mistral").model_dump(), batch, donors(0))
    assert_close(model(batch, labels=batch).loss.detach(), wanted, "loss", float(wanted))


def test_compiled() -> None:
    model = plain_model("qwen3")
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    compiled, batches = torch.compile(model, backend="eager"), tokens(3)
    for batch in batches:
        (compiled(batch, labels=batch).loss / 3).backward()
    plans = [donors(number) for number in range(3)]
    assert_gradients(gradients(model), reference_gradients("qwen3", batches, plans))


def test_a_saved_model_tells_that_it_was_trained_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = plain_model("qwen3")
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, kv_profile="every:2")
    assert not [record for record in caplog.records if "not trained" in record.getMessage()]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__module__.startswith("transformers.")


def test_lora() -> None:
    """Gradients of the adapters: the reference runs on W + scale * B A."""
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    model = get_peft_model(plain_model("qwen3"), settings)
    generator = torch.Generator().manual_seed(2)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in adapters.values():  # B starts at zero, where A has no gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    batches = tokens(2)
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / 2).backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in adapters.items()}
    weights = initial_weights("qwen3")
    for name, a in copies.items():
        if ".lora_A." in name:
            b = copies[name.replace("lora_A", "lora_B")]
            canonical = name.removeprefix("base_model.model.model.").partition(".lora_A")[0] + ".weight"
            weights[canonical] = weights[canonical] + 2.0 * b @ a
    losses = [
        reference.loss(weights, shape("qwen3").model_dump(), batch, donors(number))
        for number, batch in enumerate(batches)
    ]
    torch.stack(losses).mean().backward()
    found = gradients(model)
    assert found.keys() == copies.keys()
    largest = max(float(p.grad.abs().max()) for p in copies.values() if p.grad is not None)
    for name, p in copies.items():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        assert_close(found[name], wanted, name, max(float(wanted.abs().max()), 1e-3 * largest))


def test_trainer(tmp_path: Path) -> None:
    """Three steps of plain SGD under `Trainer` with accumulation and checkpointing: the weights of the reference."""
    model, rate = plain_model("qwen3"), 0.05
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    batches = tokens(6)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    weights = {name: w.requires_grad_() for name, w in initial_weights("qwen3").items()}
    for step in range(3):
        numbers = (2 * step, 2 * step + 1)
        losses = [reference.loss(weights, shape("qwen3").model_dump(), batches[n], donors(n)) for n in numbers]
        found = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()), materialize_grads=True)
        weights = {
            name: (w - rate * g).detach().requires_grad_() for (name, w), g in zip(weights.items(), found, strict=True)
        }
    state = model.state_dict()
    for name, weight in weights.items():
        assert_close(state[hf_name(name)], weight, name, float(weight.abs().max()))


def ddp_gradients() -> dict[str, Tensor]:
    model = plain_model("qwen3")
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    wrapped = DistributedDataParallel(model)
    return backward(wrapped, model)


def fsdp_gradients() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = plain_model("qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {name: cast(DTensor, gradient).full_tensor() for name, gradient in backward(model, model).items()}


def accelerate_gradients() -> dict[str, Tensor]:
    from accelerate import Accelerator

    model = plain_model("qwen3")
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    wrapped = accelerator.prepare(model)
    for batch in tokens(6)[accelerator.process_index :: 2]:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
    return gradients(model)


def deepspeed_gradients(stage: int) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 3,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    model = plain_model("qwen3")
    kept = HfDeepSpeedConfig(settings)  # what Trainer does; transformers holds a weak reference
    enable_rcla(model, cross_layer_prob=0.6, seed=SEED)
    engine, *_ = deepspeed.initialize(model=model, config=kept.config)
    rank = torch.distributed.get_rank()
    for batch in tokens(6)[rank::2]:
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        if engine.is_gradient_accumulation_boundary():
            found = {name: safe_get_full_grad(p).float() for name, p in model.named_parameters()}
        engine.step()
    return found


def backward(wrapped: Any, model: Any) -> dict[str, Tensor]:
    """Three passes of this rank; the batches of both ranks alternate, as their draws do."""
    rank = torch.distributed.get_rank()
    for batch in tokens(6)[rank::2]:
        (wrapped(input_ids=batch, labels=batch).loss / 3).backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("wrapping", "arguments", "plan_numbers"),
    [
        (ddp_gradients, (), range(6)),
        (accelerate_gradients, (), range(6)),
        (fsdp_gradients, (), range(6)),
        (deepspeed_gradients, (2,), [0, 0, 1, 1, 2, 2]),
        (deepspeed_gradients, (3,), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["DDP", "accelerate", "FSDP2", "ZeRO-2", "ZeRO-3"],
)
def test_two_ranks(wrapping: Any, arguments: tuple[int, ...], plan_numbers: Sequence[int]) -> None:
    """Each rank draws for itself, except under ZeRO."""
    wanted = reference_gradients("qwen3", tokens(6), [donors(number) for number in plan_numbers])
    for found in run_ranks(2, wrapping, *arguments):
        assert_gradients(found, wanted)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"cross_layer_prob": 1.5}, r"cross_layer_prob 1.5: .* the probability between 0 and 1"),
        ({"policy": "cla"}, r"policy cla .*: the policy must be uniform or strategy"),
    ],
)
def test_impossible_draws_are_refused(options: dict[str, Any], shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        enable_rcla(plain_model("qwen3"), **options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"^Linear holds 0 Qwen3, Qwen2, Llama or Mistral decoders; routing needs"):
        enable_rcla(torch.nn.Linear(2, 2))
    config = hf_config(shape("mistral"), torch.float32, {})
    config.sliding_window = 64
    with pytest.raises(UserError, match=r"sliding window of 64 tokens, .* set config.sliding_window to null"):
        enable_rcla(AutoModelForCausalLM.from_config(config))
