"""What only a GPU can show, against the plain reference: `python -m pytest -m gpu`."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.hf_models import STRATEGIES, prompts, random_weights, reference_tokens, routed_model, shape_of
from torch import Tensor

from skvr_dist.config.model import FLASH_KERNELS, AttentionName, ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import BF16, Case
from skvr_dist.lab.verify.compare import compare
from skvr_dist.lab.verify.measure import run_case
from skvr_dist.model.attention import attend, scopes_of
from skvr_dist.model.attention_choice import activate, resolve
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.model.documents import Documents
from skvr_dist.parallel.engine.process_group import start_process_group
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import CacheStrategy
from skvr_dist.train.build import build_engine
from skvr_dist.train.mfu import UtilisationMeter, peak_tflops
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.usage import UsageWatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """This process alone, on its GPU."""
    start_process_group()
    yield
    dist.destroy_process_group()


def require_kernel(name: AttentionName, head_dim: int) -> None:
    """Skip a test for which a flash kernel is not there, and put it in force."""
    torch._dynamo.reset()
    try:
        activate(resolve(name, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, head_dim).name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("policy", ["none", "uniform", "strategy"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gpu_follows_the_reference(policy: str, precision: str) -> None:
    # One rank of a data-parallel layout: bf16 needs ZeRO-1.
    case = Case("DP2 ZeRO-1", policy, tied=True, attention="sdpa", **(BF16 if precision == "bf16" else {}))
    outcome = compare(case, [run_case(case)])
    assert not outcome.misses, outcome


@pytest.mark.parametrize("variation", [{}, {"documents": "separate", "compile": "inductor"}], ids=["plain", "all"])
@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_flash_kernels_follow_the_reference(kernel: AttentionName, variation: dict[str, Any]) -> None:
    case = Case("DP2 ZeRO-1", "uniform", tied=True, attention=kernel, **BF16, **variation)
    require_kernel(kernel, case.shape["head_dim"])
    outcome = compare(case, [run_case(case)])
    assert not outcome.misses, outcome


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("separate", [False, True], ids=["joined", "documents"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_flash_kernels_follow_the_formula(kernel: AttentionName, kv_heads: int, separate: bool, compiled: bool) -> None:
    """Outputs and gradients in bf16, of an odd number of positions, against SDPA in float64."""
    batch, sequence, heads, size = 3, 517, 8, 128
    require_kernel(kernel, size)
    torch.manual_seed(0)
    numbers = torch.randint(0, 5 if separate else 1, (batch, sequence)).sort(1).values
    documents = Documents.of(numbers).to(torch.device("cuda")) if separate else None
    (scope,) = scopes_of(kernel, documents, rows=1)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, size)]
    q, k, v = (torch.randn(batch, sequence, *shape, device="cuda").bfloat16().requires_grad_() for shape in shapes)
    out = (torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend)(q, k, v, scope)
    require_formula(out, q, k, v, numbers, 1e-2)


@pytest.mark.parametrize(
    ("dtype", "separate"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)], ids=str
)
def test_sdpa_keeps_no_scores_of_grouped_heads(dtype: torch.dtype, separate: bool) -> None:
    """And gradients are right: its memory-efficient kernel on copies of keys and values."""
    sequence, heads, kv_heads, size = 2048, 16, 4, 64
    torch.manual_seed(0)
    numbers = torch.randint(0, 5 if separate else 1, (1, sequence)).sort(1).values
    (scope,) = scopes_of("sdpa", Documents.of(numbers).to(torch.device("cuda")) if separate else None, rows=1)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, size)]
    q, k, v = (torch.randn(1, sequence, *shape, device="cuda").to(dtype).requires_grad_() for shape in shapes)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(q, k, v, scope)
    torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert torch.cuda.max_memory_allocated() - before < heads * sequence**2 * dtype.itemsize
    require_formula(out, q, k, v, numbers, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def require_formula(out: Tensor, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, bound: float) -> None:
    """Compare outputs, and the gradients that come of them, with SDPA in float64 within documents int [B, S]."""
    sequence = q.shape[1]
    gradient = torch.randn_like(out)
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    numbers = numbers.cuda()
    mask = (numbers[:, None, :, None] == numbers[:, None, None]) & torch.ones(sequence, sequence).tril().bool().cuda()
    turned = [x.transpose(1, 2) for x in exact]
    wanted = F.scaled_dot_product_attention(turned[0], turned[1], turned[2], attn_mask=mask, enable_gqa=True)
    out.backward(gradient)
    wanted.backward(gradient.double().transpose(1, 2))
    gradients = [(x.grad, y.grad) for x, y in zip((q, k, v), exact, strict=True)]
    for ours, right in [(out, wanted.transpose(1, 2)), *gradients]:
        assert ours is not None and right is not None
        assert (ours.double() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize(
    "variation",
    [
        {},
        {"draws_per": "sequence", "documents": "separate"},
        {"draws_per": "sequence", "checkpointing": "layer", "compile": "inductor"},
    ],
    ids=["plain", "documents", "recomputed"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_from_an_arena_follows_the_reference(precision: str, variation: dict[str, Any]) -> None:
    pytest.importorskip("skvr_kernels")
    torch._dynamo.reset()
    precise = BF16 if precision == "bf16" else {}
    case = Case("DP2 ZeRO-1", "uniform", tied=True, attention="routed", **precise, **variation)
    outcome = compare(case, [run_case(case)])
    assert not outcome.misses, outcome


@pytest.mark.parametrize("attention", ["fa2", "routed"])
def test_documents_do_not_make_the_host_wait(attention: str) -> None:
    """Forwards and backwards over layers: PyTorch raises where a copy or a number makes the host wait for the GPU."""
    if attention == "routed":
        pytest.importorskip("skvr_kernels")
    decoder = Decoder(ModelConfig.model_validate({**Case("single").shape, "attention": attention}))
    initialize(decoder, seed=3)
    decoder.to("cuda", torch.bfloat16)
    tokens, numbers = torch.randint(0, 97, (2, 64), device="cuda"), torch.randint(0, 5, (2, 64)).sort(1).values
    donors = [[0, 0, 1, 1, 4], [0, 1, 1, 3, 3]]
    for strict in (False, True):  # what is made once is made in the first round
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            documents = Documents.of(numbers, rows=2).to(torch.device("cuda"))
            hidden, _ = decoder.run_layers(decoder.embed(tokens), donors, {}, documents=documents)
            hidden.float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 128), (torch.bfloat16, 96), (torch.bfloat16, 256)],
)
def test_routed_attention_follows_the_formula(dtype: torch.dtype, size: int) -> None:
    """Outputs and gradients of four sequences with slots of their own, within documents, in float64."""
    kernels = pytest.importorskip("skvr_kernels")
    batch, sequence, heads, kv_heads, slots = 4, 777, 8, 4, 3
    torch.manual_seed(0)
    numbers = torch.randint(0, 4, (batch, sequence), device="cuda").sort(1).values
    kv = torch.randn(2, slots, batch, sequence, kv_heads, size, device="cuda").to(dtype).requires_grad_()
    q = torch.randn(batch, sequence, heads, size, device="cuda").to(dtype).requires_grad_()
    arena = kernels.Arena(slots, batch, sequence, kv_heads, size, dtype=dtype, device="cuda")
    token, reads = kernels.arena_token("cuda"), torch.tensor([0, 2, 2, 1], device="cuda")
    for slot in range(slots):
        token = kernels.write(arena, torch.full_like(reads, slot), kv[0, slot], kv[1, slot], token)
    out, _ = kernels.attend(arena, reads, q, kernels.Documents.of(numbers), token)
    mask = (numbers[:, None, :, None] == numbers[:, None, None]) & torch.ones(sequence, sequence).tril().bool().cuda()
    right = [each.detach().double().requires_grad_() for each in (q, kv)]
    k, v = right[1][:, reads, torch.arange(batch)].transpose(2, 3)
    wanted = F.scaled_dot_product_attention(right[0].transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    wanted.backward(gradient.double().transpose(1, 2))
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for found, exact in ((out, wanted.transpose(1, 2)), (q.grad, right[0].grad), (kv.grad, right[1].grad)):
        assert found is not None and exact is not None
        assert (found.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("retained", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_greedy_tokens_of_caches(kind: str, retained: tuple[int, ...]) -> None:
    """In fp32; `generate` compiles the steps with a static cache."""
    if kind == "offloaded_static":
        # PyTorch 2.11 keeps the CUDA streams that a graph uses, and crashes when another such model is compiled.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            sequences, devices = alone.submit(greedy_tokens, kind, retained, "cuda").result()
    else:
        sequences, devices = greedy_tokens(kind, retained, "cuda")
    assert torch.equal(sequences, reference_tokens(shape_of("qwen3"), retained, prompts(), 64))
    assert devices == {"cpu" if "offloaded" in kind else "cuda"}


def greedy_tokens(kind: str, retained: tuple[int, ...], device: str) -> tuple[Tensor, set[str]]:
    """64 new tokens, and the devices of all retained layers' caches but the first one's."""
    torch._dynamo.reset()
    model = routed_model(shape_of("qwen3")).to(device)
    model.set_cache_strategy(retained)
    found = model.generate(
        prompts().to(device),
        max_new_tokens=64,
        do_sample=False,
        return_dict_in_generate=True,
        cache_implementation=kind,
    )
    held = [layer for layer in found.past_key_values.layers if layer.is_initialized]
    return found.sequences.cpu(), {layer.keys.device.type for layer in held[1:]}


@pytest.mark.parametrize("retained", STRATEGIES.values(), ids=STRATEGIES)
@torch.no_grad()
def test_flash_attention_of_transformers(retained: tuple[int, ...]) -> None:
    """In bf16, with a padded row: no further from fp32 than the formula in bf16 is, within a factor of two."""
    pytest.importorskip("flash_attn", reason="flash-attn, which transformers calls, is not installed")
    config = shape_of("qwen3", hidden_size=64, head_dim=32)
    decoder = Decoder(config)
    decoder.load_state_dict(random_weights(config, scale=0.1))
    model = routed_model(config, random_weights(config, scale=0.1)).to("cuda", torch.bfloat16)
    model.set_cache_strategy(retained)
    x, mask = prompts(), torch.ones(16, 12, dtype=torch.long)
    mask[1, :5] = 0
    sources = CacheStrategy(config.num_hidden_layers, retained).kv_source_layers
    wanted = decoder(x, sources)
    wanted[1, 5:] = decoder(x[1:2, 5:], sources)[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for keep in (0, 1, 3):
        errors = {}
        for kernel in ("eager", "flash_attention_2"):
            model.set_attn_implementation(kernel)
            found = model(x.cuda(), attention_mask=mask.cuda(), position_ids=positions.cuda(), logits_to_keep=keep)
            errors[kernel] = ((found.logits.cpu().float() - wanted[:, -keep:]) * mask[:, -keep:, None]).norm()
        assert errors["flash_attention_2"] <= 2 * errors["eager"]


def test_what_a_run_says_of_itself() -> None:
    """MFU, or n/a by the name of the GPU; its memory; and the parts of a step by its own clock."""
    case = Case("DP2 ZeRO-1", **BF16)
    config = case.config()
    mesh = Mesh.build(config.parallel, config.model)
    engine, meter = build_engine(config, mesh), UtilisationMeter(config, mesh)
    usage = UsageWatch(mesh, every_steps=100, last_step=case.steps)
    for step, batch in enumerate(case.micro_batches(), start=1):
        plan = plan_of_step(config, step - 1)
        engine.train_step(iter(batch), plan)
        torch.cuda.synchronize()
        engine.stopwatch.read()
        usage.add(engine.stopwatch.parts)
        used = usage.report(step)
    mfu = meter.values(1, plan, 1.0, 0.0)["train/mfu"]
    assert math.isnan(mfu) == (peak_tflops(torch.cuda.get_device_name(), "bf16") is None) and not mfu > 1
    assert used["memory/reserved_gib/stage_0"] >= used["memory/allocated_peak_gib/stage_0"] > 0
    assert all(used[f"time/{part}_seconds/stage_0"] > 0 for part in ("load", "forward", "backward", "optimizer"))
