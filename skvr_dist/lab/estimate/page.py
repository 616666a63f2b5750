"""docs/scale.md: layouts for three models on up to 1,024 GPUs, as the closed forms predict them.

python -m skvr_dist.lab.estimate.page > docs/scale.md
"""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate

from skvr_dist.config.load import load_config
from skvr_dist.config.presets import find_configs
from skvr_dist.errors import UserError
from skvr_dist.host_group import connections
from skvr_dist.lab.estimate.layout import GIB
from skvr_dist.lab.estimate.propose import Proposal, propose, require_any
from skvr_dist.lab.estimate.speed import PRESETS

MODELS = ("qwen3-1.7b", "qwen3-8b", "llama-3.1-70b")
SEQUENCES = {8: 64, 64: 256, 512: 1024, 1024: 1024}
"""GPUs, and sequences of a step on them."""
_GPU, _RATES = "h100", PRESETS["h100"]
_SETTINGS = (
    "train.precision=bf16",
    "train.micro_batch_size=1",
    "data.sequence_length=4096",
    "parallel.stage_layers=null",
)

_HEAD = f"""# Models on 8 to 1,024 GPUs

**Predicted, not measured.** Every figure on this page follows from closed forms (`skvr_dist/lab/estimate`) and from the
rates of an H100 SXM: {_RATES.tflops:g} TFLOP/s in bf16, {_RATES.host_gbytes:g} GB/s to GPUs of its host and
{_RATES.network_gbytes:g} GB/s to others, one way, {_RATES.memory_gib:g} GiB that a process can use, and an assumed
{_RATES.efficiency:.0%} of the peak that products reach. They are good for choosing among layouts. What was measured,
the memory and bytes of single ranks, dry runs and sockets, stands apart, in
[benchmarks/2026-11-26-estimate.md](benchmarks/2026-11-26-estimate.md) and
[benchmarks/2026-11-26-scale.md](benchmarks/2026-11-26-scale.md).

Steps of {" or ".join(f"{number:,}" for number in sorted(set(SEQUENCES.values())))} sequences of 4,096 tokens in bf16,
routed by `strategy` at probability 0.5. The layouts are the fastest that fit; the commands print more of them, and why
they lose. `make docs` makes this page.

* **layout**: stages (PP) x replicas (DP) x tensor-parallel ranks (TP); SP: with sequence parallelism
* **GiB**: tensors at the peak of a step on the rank that holds most; the allocator, CUDA and NCCL take some on top
* **GB sent**: what the rank that sends most puts in a step into operations among tensor-parallel ranks, to other
  stages, and among replicas
* **sockets**: connections of a rank over gloo (`Mesh.sockets`); rank 0 may hold the store too, with one for each rank
"""


def as_page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *(section(model) for model in MODELS)])


def section(model: str, sizes: tuple[int, ...] = tuple(SEQUENCES)) -> str:
    """What is said of one model.

    Args:
        sizes: GPUs.
    """
    rows, said = [], []
    for gpus in sizes:
        try:
            best = _best(model, gpus)
        except UserError as error:
            said.append(f"* {gpus:,} GPUs: {error}")
            continue
        rows.append(_row(gpus, best))
        said.append(f"* {gpus:,} GPUs: `{best.overrides}`")
    table = tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github") if rows else ""
    commands = "\n".join(f"    {command(model, gpus)}" for gpus in sizes)
    lines = [f"## {model}", table, "Keys of these layouts, beside those of the commands:", "\n".join(said), commands]
    return "\n\n".join(lines) + "\n"


def command(model: str, gpus: int) -> str:
    """The command that ranks layouts of a model."""
    words = [
        "python tools/estimate.py train --propose --config quickstart --config",
        model,
        f"--gpus {gpus} --gpu {_GPU}",
    ]
    return " ".join([*words, *_overrides(gpus)])


def _overrides(gpus: int) -> Iterator[str]:
    yield from _SETTINGS
    yield f"train.global_batch_size={SEQUENCES[gpus]}"
    yield f"data.lanes={SEQUENCES[gpus]}"


def _best(model: str, gpus: int) -> Proposal:
    config = load_config(find_configs(["quickstart", model]), list(_overrides(gpus)))
    found = propose(config, gpus, _RATES)
    require_any(found, _RATES)
    return found[0]


def _row(gpus: int, best: Proposal) -> dict[str, str]:
    whole = best.estimate
    sent: dict[str, float] = {}
    for stage in whole.stages:
        by_link: dict[str, float] = {}
        for (link, operation), size in stage.traffic.items():
            if operation != "receive":
                name = "stages" if link in ("forwards", "backwards") else link
                by_link[name] = by_link.get(name, 0) + size / 1e9
        sent = {name: max(sent.get(name, 0), by_link.get(name, 0)) for name in {*sent, *by_link}}
    return {
        "GPUs": f"{gpus:,}",
        "layout": whole.short,
        "GiB": f"{whole.worst.memory.total / GIB:.1f}",
        "step s": f"{whole.speed.step_seconds:.2f}",
        "MFU": f"{whole.speed.mfu:.0%}",
        "bubble": f"{whole.speed.bubble:.0%}",
        "GB sent: tensor": f"{sent.get('tensor', 0):.1f}",
        "stages": f"{sent.get('stages', 0):.1f}",
        "replicas": f"{sent.get('replicas', 0):.1f}",
        "sockets": str(2 * connections(gpus) + whole.stages[0].rank.tensor),
    }


if __name__ == "__main__":
    print(as_page(), end="")
