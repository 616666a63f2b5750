"""What fits on a GPU that serves, against what models and caches really hold."""

from __future__ import annotations

import argparse

import pytest
import torch

from skvr_dist.commands.estimate.serve import add_arguments, run
from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.evaluate.generate import cache_bytes, generate
from skvr_dist.lab.estimate.serve import Fit, Server, break_even, fit_strategies, tokens_that_fit
from skvr_dist.lab.verify.cases import Case
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.routing import CacheStrategy

MODEL = ModelConfig.model_validate(Case("single").shape)
STRATEGIES = CacheStrategy.parse_all(["full", "every:2", "0,3", "prefix:1"], MODEL.num_hidden_layers)


def server(memory: int = 10**6, other: int = 0, context: int = 20) -> Server:
    return Server(memory, other, context, weight_bytes=4, cache_bytes=4, block=8)


def test_cache_bytes_are_what_a_cache_holds() -> None:
    decoder = Decoder(MODEL)
    initialize(decoder, seed=0)
    prompt = torch.arange(5)
    for fit in fit_strategies(MODEL, server(), STRATEGIES):
        _, cache = generate(decoder, prompt, fit.strategy, max_new_tokens=4)
        assert cache_bytes(cache) == (5 + 4 - 1) * fit.cache_bytes_per_token  # the last token was not read


def test_weights_are_those_that_an_engine_loads() -> None:
    decoder = Decoder(MODEL)
    readers = {name: [layer for layer in range(5) if layer not in s.retained] for name, s in STRATEGIES.items()}
    for fit in fit_strategies(MODEL, server(), STRATEGIES):
        unused = tuple(f"layers.{layer}.self_attn.{part}" for layer in readers[fit.name] for part in ("k_", "v_"))
        loaded = [p.nbytes for name, p in decoder.named_parameters() if not name.startswith(unused or ("-",))]
        assert fit.weights == sum(loaded)


def test_whole_blocks_and_whole_sequences() -> None:
    [fit, *_] = fit_strategies(MODEL, server(), STRATEGIES)
    blocks = (10**6 - fit.weights) // (8 * fit.cache_bytes_per_token)
    assert fit.tokens == 8 * blocks == tokens_that_fit(10**6 - fit.weights, fit.cache_bytes_per_token, 8)
    assert fit.sequences == blocks // 3  # 20 tokens take three blocks of 8
    [none, *_] = fit_strategies(MODEL, server(memory=1000), STRATEGIES)
    assert none.tokens < 0 and none.sequences == 0
    longest = MODEL.max_position_embeddings
    with pytest.raises(UserError, match=f"a context of {longest + 1:,} tokens is more than the model's {longest:,}"):
        fit_strategies(MODEL, server(context=longest + 1), STRATEGIES)


def sequences_of_two(premium: Fit, bulk: Fit, room: float, share: float) -> float:
    """Sequences of two engines that share the room, at that share of premium ones."""
    of_one = share * premium.cache_bytes_per_token + (1 - share) * bulk.cache_bytes_per_token
    return (room - premium.weights - bulk.weights) / of_one


@pytest.mark.parametrize("memory", [250_000, 10**6, 10**8])
def test_two_engines_hold_as_many_as_one_at_the_break_even(memory: int) -> None:
    fits = fit_strategies(MODEL, server(memory), STRATEGIES)
    premium, bulk = fits[0], fits[-1]
    share = break_even(server(memory), premium, bulk).share
    one = (memory - premium.weights) / premium.cache_bytes_per_token
    if share is None:
        assert sequences_of_two(premium, bulk, memory, 0.0) <= one
    else:
        assert sequences_of_two(premium, bulk, memory, share) == pytest.approx(one)
    assert break_even(server(memory), bulk, premium).share is None


@pytest.mark.parametrize("option", ["--memory-gib", "--other-gib"])
@pytest.mark.parametrize("gib", ["nan", "inf", "-5", "much", "1e300"])
def test_memory_is_a_number(option: str, gib: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match=rf"{option}: .*(not a|below 0|more than 1e\+09)"):
        parser.parse_args(["tiny", "--memory-gib", "80", "--context", "16", f"{option}={gib}"])


def test_what_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a small model it is not its weights."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["tiny", "--memory-gib", "1", "--context", "16"])) == 1
    assert "| weights and 2 GiB beside do not fit |" in capsys.readouterr().out
