"""Memory that the loss takes beside the gradients of hidden states and head: at most 700 MiB.

    skvr-bench loss
    skvr-bench loss --tokens 16384 --hidden 4096 --vocabulary 128256 --json loss.json

For one sequence of 4,096 tokens and the vocabulary of Qwen3 in bf16, by default. Nothing is computed: the tensors have
sizes only, so that any size fits on any machine, and a loss that waits for the device fails. Exit code 1: more memory
than the bound.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tabulate import tabulate

from skvr_dist.command import Figure, add_bound, add_json, at_least, conclude


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="of a micro-batch (default: 4096)")
    parser.add_argument("--hidden", type=at_least(1), default=2048, help="size of a hidden state (default: 2048)")
    parser.add_argument("--vocabulary", type=at_least(1), default=151_936, help="tokens (default: 151936)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: bf16)")
    add_bound(parser, 700.0, "most MiB beside the two gradients")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure each way; returns the exit code."""
    import torch

    from skvr_dist.lab.bench.loss import MIB, Sizes, all_logits, in_chunks, in_chunks_with_a_teacher, memory_of

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    whole = Sizes(options.tokens, options.hidden, options.vocabulary, dtype)
    quarter = Sizes(options.tokens, options.hidden, -(-options.vocabulary // 4), dtype)
    taken = {
        "all logits, torch's cross entropy": memory_of(all_logits, whole),
        "in chunks": memory_of(in_chunks, whole),
        "in chunks, with a divergence": memory_of(in_chunks_with_a_teacher, whole),
        "in chunks, one of 4 tensor-parallel ranks": memory_of(in_chunks, quarter),
    }
    rows = [[name, *(f"{size / MIB:,.0f}" for size in (each.extra, each.gradients))] for name, each in taken.items()]
    worst = max(each.extra for name, each in taken.items() if name.startswith("in chunks")) / MIB
    figure = Figure(
        f"{worst:,.0f} MiB beside the gradients, {options.tokens:,} tokens x {options.vocabulary:,}",
        f"{options.bound:g} MiB",
        worst <= options.bound,
    )
    table = tabulate(rows, headers=["loss", "MiB beside the gradients", "gradients"], tablefmt="github")
    record = {"tokens": options.tokens, "hidden": options.hidden, "vocabulary": options.vocabulary}
    record |= {"precision": options.precision, "bound_mib": options.bound}
    record["mib"] = {n: {"extra": each.extra / MIB, "gradients": each.gradients / MIB} for n, each in taken.items()}
    return conclude([figure], table=table, record=record, json_file=options.json)
