"""vLLM with our plugin: the tokens of the plain reference, and a cache that holds full / retention tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import vllm
from support.hf_models import STRATEGIES, export_checkpoint, random_weights, reference_tokens, shape_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.model_executor.models.llama import LlamaAttention

from skvr_dist.commands import bench, replay
from skvr_dist.config.model import ModelConfig
from skvr_dist.data.prepare.corpus import Document
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import export_model
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.lab.estimate.serve import tokens_that_fit
from skvr_dist.routing import CacheStrategy, RoutingConfig
from skvr_dist.serve.server import vllm_server
from skvr_dist.serve.sharing import reader_weights, require_known_attention, require_one_stage

LAYERS, NEW_TOKENS = 8, 64
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 400}
SCALE = 0.15
"""Of the weights: without query/key norms larger ones make such scores that rounding shows in the export's check."""
CONFIGS = {
    "qwen3": shape_of("qwen3", **SHAPE),
    "qwen2": shape_of("qwen2", **SHAPE | {"hidden_size": 128}),
    "llama": shape_of("llama", tie_word_embeddings=True, attention_bias=True, **SHAPE),
    "mistral": shape_of("mistral", **SHAPE),
}
PROFILES = {name: ",".join(map(str, layers)) for name, layers in STRATEGIES.items() if name == "irregular"}
TRAINING = Training(RoutingConfig(policy="uniform", cross_layer_prob=0.5), {}, profiles=PROFILES)


def export(folder: Path, config: ModelConfig, **options: Any) -> Path:
    weights = random_weights(config, SCALE)
    tokenizer = None if config.architecture == "qwen2" else folder.parent / "tokenizer.model"  # it needs Qwen's own
    if tokenizer is not None and not tokenizer.exists():
        documents = [
            Document(str(number), path.read_text())
            for number, path in enumerate(sorted(Path(__file__).parent.glob("*.py")))
        ]
        train_tokenizer(documents, vocab_size=400).save(tokenizer)
    export_model(
        config, weights, weights.__getitem__, tokenizer, folder, training=TRAINING, dtype=torch.float32, **options
    )
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    found = {name: export(folder / name, config) for name, config in CONFIGS.items()}
    found["pruned"] = export(
        folder / "pruned", CONFIGS["qwen3"], pruned_to=CacheStrategy(LAYERS, STRATEGIES["every:4"])
    )
    return found


def prompts() -> Tensor:
    return torch.randint(3, 400, (16, 12), generator=torch.Generator().manual_seed(9))


def wanted_tokens(config: ModelConfig, retained: tuple[int, ...], inputs: Tensor) -> list[list[int]]:
    return reference_tokens(config, retained, inputs, NEW_TOKENS, SCALE)[:, inputs.shape[1] :].tolist()


@contextmanager
def engine(folder: Path, overrides: Mapping[str, Any], **options: Any) -> Iterator[LLM]:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, **options}
    options["skip_tokenizer_init"] = not (folder / "tokenizer.json").exists()
    llm = LLM(str(folder), hf_overrides=dict(overrides), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def greedy_tokens(llm: LLM) -> list[list[int]]:
    """After each of the prompts."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": row} for row in prompts().tolist()]
    return [list(out.outputs[0].token_ids) for out in llm.generate(inputs, sampling, use_tqdm=False)]


def serve(folder: Path, **overrides: Any) -> tuple[list[list[int]], int]:
    """The greedy tokens of all prompts, and the tokens that the cache holds."""
    with engine(folder, overrides) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None
        return greedy_tokens(llm), cache.num_gpu_blocks * cache.block_size


def capacity(config: ModelConfig, retained: int) -> int:
    """Tokens that fit into the budget, as `skvr-estimate serve` counts them."""
    bytes_per_token = retained * 2 * config.num_key_value_heads * config.head_dim * 4
    return tokens_that_fit(int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30, bytes_per_token, BLOCK)


BLOCK = 128


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_and_capacity(family: str, exports: Mapping[str, Path]) -> None:
    config = CONFIGS[family]
    strategies = {"full": tuple(range(LAYERS)), **STRATEGIES}
    for name, retained in strategies.items():
        tokens, held = serve(exports[family], kv_profile=name)
        assert tokens == wanted_tokens(config, retained, prompts()), name
        assert held == capacity(config, len(retained)), name


def test_other_ways_to_name_a_strategy(exports: Mapping[str, Path], tmp_path: Path) -> None:
    """By a map; in config.json; and pruned. All are every:4."""
    wanted = wanted_tokens(CONFIGS["qwen3"], STRATEGIES["every:4"], prompts())
    assert serve(exports["qwen3"], kv_source_layers=[0, 0, 0, 0, 4, 4, 4, 4])[0] == wanted
    assert serve(exports["pruned"])[0] == wanted
    for file in exports["qwen3"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**stored, "kv_profile": "every:4"}))
    assert serve(tmp_path)[0] == wanted


def test_what_was_imported_is_served(exports: Mapping[str, Path], tmp_path: Path) -> None:
    """Import, export, serve: a published checkpoint at any strategy, though nothing here has trained it."""
    import_model(str(exports["llama"]), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    for name in ("every:2", "prefix:3"):
        tokens, _ = serve(tmp_path / "again", kv_profile=name)
        assert tokens == wanted_tokens(CONFIGS["llama"], STRATEGIES[name], prompts()), name


@pytest.mark.parametrize("family", CONFIGS)
def test_fast_prefill(family: str, exports: Mapping[str, Path]) -> None:
    """Layers above the last retained one see a prompt's last position alone; the tokens stay the same."""
    seen: dict[int, int] = {}

    def watch(model: Any) -> None:
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(
                lambda module, args, n=number: seen.update({n: seen.get(n, 0) + len(args[0])})
            )

    config, options = CONFIGS[family], {"kv_sharing_fast_prefill": True, "max_num_batched_tokens": 40}
    with engine(exports[family], {"kv_profile": "prefix:3"}, **options) as llm:
        llm.apply_model(watch)
        assert greedy_tokens(llm) == wanted_tokens(config, STRATEGIES["prefix:3"], prompts())
    prompt_tokens, new_tokens = prompts().numel(), len(prompts()) * (NEW_TOKENS - 1)
    assert [number for number, positions in seen.items() if positions == prompt_tokens + new_tokens] == [0, 1, 2]
    # A prompt that is computed in two pieces has a last position in each.
    assert all(seen[number] < new_tokens + 2 * len(prompts()) for number in range(3, LAYERS))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (
            {"kv_sharing_fast_prefill": True, "enforce_eager": False},
            r"does not work without --enforce-eager; .*: layers 3 to 7 then see the whole prompt$",
        ),
        ({"enable_lora": True}, r"LoRA adapters add to layers that read the cache of others; merge the adapter"),
    ],
    ids=["fast prefill", "LoRA"],
)
def test_impossible_options_are_refused(options: dict[str, Any], shown: str, exports: Mapping[str, Path]) -> None:
    with pytest.raises(UserError, match=shown), engine(exports["qwen3"], {"kv_profile": "prefix:3"}, **options):
        pass


def test_a_pruned_layer_is_refused(exports: Mapping[str, Path]) -> None:
    with pytest.raises(UserError, match=r"layer 2 was pruned from this checkpoint .*; retain some of layers \[0, 4\]"):
        serve(exports["pruned"], kv_profile="every:2")


def test_two_sets_of_weights_are_refused(exports: Mapping[str, Path], tmp_path: Path) -> None:
    """vLLM would take those of the index, transformers the single file."""
    shutil.copytree(exports["mistral"], tmp_path / "twice")
    shutil.copy(tmp_path / "twice/model.safetensors", tmp_path / "twice/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "twice/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"twice holds two sets of weights: vLLM would load model-00001-of-00001.safet"):
        serve(tmp_path / "twice")


def test_scales_of_a_reader_are_refused() -> None:
    weights = [("model.layers.1.self_attn.k_proj.k_scale", torch.ones(1))]
    assert list(reader_weights(weights, [0, 1])) == weights
    with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj.k_scale scales a cache that this layer has not"):
        list(reader_weights(weights, [0, 0]))


def test_tensor_parallel(exports: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers are sharded like the layers that they stand for."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "kv_sharing_fast_prefill": True}
    with engine(exports["qwen3"], {"kv_profile": "prefix:3"}, **options) as llm:
        assert greedy_tokens(llm) == wanted_tokens(CONFIGS["qwen3"], STRATEGIES["prefix:3"], prompts())


def test_an_unknown_profile_is_refused(exports: Mapping[str, Path]) -> None:
    with pytest.raises(UserError, match=r"cannot read cache strategy 'bulk'; .* or a named profile \(irregular\)$"):
        serve(exports["qwen3"], kv_profile="bulk")


def test_a_pipeline_cut_between_owner_and_reader_is_refused() -> None:
    sources = CacheStrategy.parse("0,3", 8).kv_source_layers
    require_one_stage(sources, 0, 3)
    require_one_stage(sources, 3, 8)
    with pytest.raises(
        UserError,
        match=r"^layer 4 reads the cache of layer 3, but a pipeline stage begins at layer 4 between them, .*; retain "
        r"layer 4 too, or serve with pipeline_parallel_size 1$",
    ):
        require_one_stage(sources, 4, 8)


def test_attention_of_another_version_is_refused() -> None:
    """An attribute that a later vLLM renames would be set in vain, and readers would have an empty cache."""
    attention = LlamaAttention.__new__(LlamaAttention)
    torch.nn.Module.__init__(attention)
    with pytest.raises(UserError, match=rf"^vLLM {vllm.__version__}: its LlamaAttention has no qkv_proj, but sharing"):
        require_known_attention(attention)

    class Renamed(LlamaAttention):
        def forward(self, hidden_states: torch.Tensor) -> None: ...

    attention.__class__ = Renamed
    with pytest.raises(UserError, match=r"its Renamed has no qkv_proj, .*; serve with vLLM 0\.32, with a newer"):
        require_known_attention(attention)


@pytest.fixture(scope="module")
def servers(exports: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of servers with the OpenAI interface, by their profiles."""
    options = ["--served-model-name", "model", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    logs = tmp_path_factory.mktemp("logs")
    profiles = ("full", "irregular")

    def start(stack: ExitStack, profile: str) -> str:
        server = vllm_server(exports["qwen3"], profile, logs / f"{profile}.log", options=options)
        return stack.enter_context(server)

    with ExitStack() as stack, ThreadPoolExecutor() as pool:  # both at once: a start is 10 s of imports
        yield dict(zip(profiles, pool.map(partial(start, stack), profiles), strict=True))


def test_over_http(servers: Mapping[str, str]) -> None:
    inputs = prompts()[:4]
    body = {
        "model": "model",
        "prompt": inputs.tolist(),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{servers['irregular']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    found = [choice["token_ids"] for choice in answer["choices"]]
    assert found == wanted_tokens(CONFIGS["qwen3"], STRATEGIES["irregular"], inputs)
    assert all(choice["text"] for choice in answer["choices"])


def replayed(
    servers: Mapping[str, str], folder: Path, requests: Sequence[Mapping[str, Any]], words: Sequence[str] = ()
) -> int | None:
    """Run the command on a trace, at full retention and at one profile; returns its exit code."""
    (folder / "trace.jsonl").write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    urls = [f"{profile}={url}" for profile, url in servers.items()]
    with pytest.MonkeyPatch.context() as patch:
        start = ["replay", "run", str(folder / "trace.jsonl"), "--output", str(folder / "out")]
        patch.setattr("sys.argv", [*start, *words, "--url", *urls])
        return replay.run()


REQUESTS = [
    {"arrival": 0.2 * number, "prompt": text, "max_tokens": 12 + number, "name": f"request {number}"}
    for number, text in enumerate(("def serve(folder", "import pytest\n", "@pytest.fixture\ndef ", "return prompts"))
]


def test_a_trace_is_replayed(servers: Mapping[str, str], exports: Mapping[str, Path], tmp_path: Path) -> None:
    """Answers of greedy decoding cost what transformers computes for its own."""
    assert replayed(servers, tmp_path, REQUESTS, ["--max-failed", "0", "--exact-tokens"]) == 0
    report = json.loads((tmp_path / "out/replay.json").read_text())
    for figures in report["profiles"]:
        assert figures["requests"] == 4 and figures["failed"] == 0
        assert figures["tokens"] == sum(12 + number for number in range(4))
        assert 0 < figures["first_token_median"] <= figures["first_token_p95"] < 60 and figures["per_token_median"] > 0
        assert figures["counters"]["num_preemptions_total"] == 0
    full, irregular = (figures["counters"]["cache_tokens"] for figures in report["profiles"])
    assert irregular == capacity(CONFIGS["qwen3"], 4) and full == capacity(CONFIGS["qwen3"], 8)
    (compared,) = report["comparisons"]
    costs = [answer["cost"] for answer in compared["answers"]]
    assert compared["compared"] == 4 and costs == sorted(costs, reverse=True) and costs[0] > 0
    models = [
        AutoModelForCausalLM.from_pretrained(exports["qwen3"], kv_profile=name).eval() for name in ("full", "irregular")
    ]
    tokenizer = AutoTokenizer.from_pretrained(exports["qwen3"])
    for answer in compared["answers"]:
        request = next(each for each in REQUESTS if each["name"] == answer["name"])
        prompt = tokenizer(request["prompt"], return_tensors="pt").input_ids
        wanted = request["max_tokens"]
        options = {"max_new_tokens": wanted, "min_new_tokens": wanted, "do_sample": False}
        tokens = models[0].generate(prompt, **options)
        before, after = (log_probs(model, tokens, prompt.shape[1]) for model in models)
        assert answer["cost"] == pytest.approx(float((before - after).mean()), abs=1e-4)
        assert answer["worst_cost"] == pytest.approx(float((before - after).max()), abs=1e-4)
    page = (tmp_path / "out/replay.md").read_text()
    assert "### At `irregular`" in page and compared["answers"][0]["at_first"] in page


@torch.inference_mode()
def log_probs(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """[answer] of what follows the prompt."""
    found = model(tokens).logits[0].log_softmax(-1)
    return found[:-1].gather(-1, tokens[0, 1:, None])[prompt - 1 :, 0]


def test_a_bound_that_is_missed_ends_with_1(servers: Mapping[str, str], tmp_path: Path) -> None:
    assert replayed(servers, tmp_path, REQUESTS[:1], ["--max-cost", "1e-9"]) == 1


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (
            {"arrival": 0, "prompt": "import " * 200, "max_tokens": 8},
            r"line 1: a prompt of \d+ tokens and 8 wanted are more than the 128 that the server at .* reads; shorten",
        ),
        (
            {"arrival": 0, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
            r"line 1: the server at .* cannot read it \(.*chat template.*\); correct it$",
        ),
    ],
    ids=["too long", "chat"],
)
def test_what_the_server_cannot_read_is_refused(
    request_: Mapping[str, Any], shown: str, servers: Mapping[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=shown):
        replayed(servers, tmp_path, [request_])


def test_a_worker_that_died_is_told_of(exports: Mapping[str, Path], tmp_path: Path) -> None:
    """vLLM itself says only that its engine is dead; here the worker meets what an illegal instruction sends."""
    log = tmp_path / "server.log"
    options = ["--distributed-executor-backend", "mp", "--dtype", "float32", "--enforce-eager"]
    died = rf"^no server answers at .*{log} says: Worker proc \S+ died unexpectedly\. Look there"
    with pytest.raises(UserError, match=died), vllm_server(exports["qwen3"], "full", log, options=options) as url:
        api_server, worker = (
            psutil.Process(int(re.findall(rf"\({name} pid=(\d+)\)", log.read_text())[-1]))
            for name in ("APIServer", "Worker")
        )
        worker.send_signal(signal.SIGILL)
        api_server.wait(60)
        replayed({"full": url}, tmp_path, REQUESTS[:1])


def test_generation_is_timed(exports: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of what is timed of transformers, with the bytes per token that the engine holds; the model has 256
    positions, and neither refuses a longer prompt."""
    figures = tmp_path / "figures.json"
    words = ["--model", str(exports["qwen3"]), "--strategies", "every:4", "--prompt-tokens", "300", "--batch", "2"]
    words += ["--new-tokens", "2", "--rounds", "2", "--memory-gib", "20", "--most-batch", "1", "--json", str(figures)]
    monkeypatch.setattr("sys.argv", ["bench", "generate", "--engine", "vllm", *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # which the command sets aside, and the next test needs
        assert bench.run() == 0
    record = json.loads(figures.read_text())
    full, quarter = record["speeds"]
    assert (full["cache_bytes_per_token"], quarter["cache_bytes_per_token"]) == (8 * 2 * 2 * 32 * 4, 2 * 2 * 2 * 32 * 4)
    for speed in (full, quarter):
        assert len(speed["first_token_seconds"]) == len(speed["decode_seconds"]) == 2 and speed["peak_bytes"] > 10**8
        assert min(speed["first_token_seconds"] + speed["decode_seconds"]) > 0
    assert [each["tried"] for each in record["largest_batches"]] == [[1], [1]]
    with pytest.raises(UserError, match=r"--device cuda: vLLM was built for cpu; leave the option out"):
        monkeypatch.setattr("sys.argv", ["bench", "generate", "--engine", "vllm", "--device", "cuda"])
        bench.run()
