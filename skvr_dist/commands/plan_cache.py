"""Choose the layers that keep a key/value cache, by what each choice costs on your text.

    skvr-plan-cache runs/quickstart/routed --calibrate data/stdlib/train
    skvr-plan-cache runs/mine --calibrate code=data/code chat=data/chat --test code=data/code-test chat=data/chat-test
    skvr-plan-cache runs/mine --calibrate data/code --budget 3072

CHECKPOINT is a checkpoint's folder, or a run's, which stands for its latest checkpoint. Texts are data sets that were
prepared with its tokenizer; the layers are searched on the --calibrate texts and judged on the --test texts (default:
the run's held-out data), which must be others. Each profile names a size: --profile NAME=SHARE, or NAME=SHARE@LAST
where layers above LAST are to keep nothing, so that a prefill can leave them out. The plan is kept in the checkpoint,
and an export carries its profiles, unless --json names another place. With --kvsharer the layers that KVSharer (arXiv
2410.18517) would let share are searched and tested beside them. Exit code 1: --most-rise was given, and a profile costs
more.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import Figure, a_path, add_json, at_least, conclude, finite, new_parser, parse, run_command
from skvr_dist.commands import kvsharer
from skvr_dist.errors import UserError
from skvr_dist.files import prove_writable

if TYPE_CHECKING:
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.data.batch import MicroBatch
    from skvr_dist.evaluate.cache_plan import CachePlan, PlannedProfile, Profile
    from skvr_dist.evaluate.curve import HeldOutData

USUAL_PROFILES = ("premium=1/2", "standard=1/3", "bulk=1/5", "fast-prefill=1/3@half")
_MOST_OVERLAP = 0.05


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Search, test, print and keep the plan; returns the exit code."""
    options = _options()

    import torch

    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.evaluate.cache_plan import PLAN_FILE, named_strategies, plan_caches
    from skvr_dist.evaluate.curve import require_losses
    from skvr_dist.evaluate.kvsharer import against_plan

    checkpoint = Checkpoint(options.checkpoint)
    layers = checkpoint.model_config.num_hidden_layers
    profiles = _profiles(options, checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calibrations = _texts(checkpoint, options.calibrate, options.sequence_length)
    tests = _texts(checkpoint, options.test or [None], options.sequence_length)
    json_file = prove_writable(options.json or checkpoint.folder / PLAN_FILE)
    searched = {n: text.batches(options.sequences, options.batch_size, device) for n, text in calibrations.items()}
    tested = {n: text.batches(options.test_sequences, options.batch_size, device) for n, text in tests.items()}
    _require_apart(searched, tested)
    decoder = checkpoint.load_decoder().to(device)
    plan = plan_caches(
        decoder,
        searched,
        tested,
        profiles,
        required=options.keep,
        swap_rounds=options.swaps,
        most_to_exhaust=options.exhaust_up_to,
        seed=options.seed,
    )
    for full_loss in plan.full_loss.values():
        require_losses(checkpoint, {"full": full_loss})
    record = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "calibration": {name: _described(text, searched[name]) for name, text in calibrations.items()},
        "test": {name: _described(text, tested[name]) for name, text in tests.items()},
        "profiles": named_strategies(plan),
        "plan": _plain(asdict(plan)),
    }
    table = "\n\n".join(_table(plan, test, layers, _bytes_per_layer(checkpoint)) for test in tests)
    if options.kvsharer is not None:
        shared = against_plan(decoder, searched, tested, plan, options.kvsharer)
        record["kvsharer"] = {"threshold": options.kvsharer, "profiles": shared}
        table = "\n\n".join([table, *(kvsharer.as_table(shared, test, options.kvsharer) for test in tests)])
    table = "\n\n".join([table, *(_front_table(plan, name, _bytes_per_layer(checkpoint)) for name in calibrations)])
    code = conclude(_figures(plan, options.most_rise), table=table, record=record, json_file=json_file)
    carried = f"; tools/export_hf.py {options.checkpoint} OUT carries the profiles" if options.json is None else ""
    print(f"\n{_sharing(plan)}\nwritten: {json_file}{carried}")
    return code


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=a_path)
    parser.add_argument("--calibrate", nargs="+", required=True, metavar="[NAME=]FOLDER", help="texts to search on")
    parser.add_argument("--test", nargs="+", metavar="[NAME=]FOLDER", help="texts to judge on")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--profile", action="append", metavar="NAME=SHARE", help=f"default: {' '.join(USUAL_PROFILES)}")
    size.add_argument("--retention", metavar="R", help="one profile: this share of the layers")
    size.add_argument("--budget", type=at_least(1, 10**9), metavar="BYTES", help="one profile: cache bytes per token")
    parser.add_argument(
        "--last", type=at_least(0), metavar="LAYER", help="with --retention or --budget: the highest one"
    )
    parser.add_argument(
        "--keep",
        type=_layers,
        default=(0,),
        metavar="0,14",
        help="layers that keep a cache in any case, such as the first ones of a serving pipeline's stages",
    )
    parser.add_argument("--sequences", type=at_least(1), default=128, metavar="N", help="to search on (default: 128)")
    parser.add_argument("--test-sequences", type=at_least(1), metavar="N", help="default: 256, or as many as there are")
    parser.add_argument("--sequence-length", type=at_least(1, 10**8), metavar="N", help="default: the run's")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--swaps", type=at_least(0), default=3, metavar="N", help="rounds of swaps (default: 3)")
    parser.add_argument(
        "--exhaust-up-to", type=at_least(0), default=512, metavar="N", help="try all sets if there are at most so many"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random sets beside the plan (default: 0)")
    parser.add_argument(
        "--most-rise", type=finite, metavar="NATS", help="a profile that costs more on a test text misses its figure"
    )
    kvsharer.add_kvsharer(parser)
    add_json(parser, "default: cache-plan.json in the checkpoint")
    options = parse(parser)
    kvsharer.require_comparable(options)
    if options.last is not None and options.retention is None and options.budget is None:
        parser.error("--last goes with --retention or --budget; a profile names its own: NAME=SHARE@LAST")
    return options


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({0, *(int(part) for part in text.split(","))}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} does not list layers; write 0,14") from None


def _profiles(options: argparse.Namespace, checkpoint: Checkpoint) -> list[Profile]:
    from skvr_dist.evaluate.cache_plan import Profile

    layers, per_layer = checkpoint.model_config.num_hidden_layers, _bytes_per_layer(checkpoint)
    if options.budget is not None:
        if options.budget < per_layer:
            raise UserError(
                f"--budget {options.budget} bytes per token is less than the cache of one layer, {per_layer}, which is "
                f"the smallest there is"
            )
        allowed = layers if options.last is None else options.last + 1
        return [Profile("budget", min(allowed, options.budget // per_layer), options.last)]
    if options.retention is not None:
        return [profile_of("retention", options.retention, layers, options.last)]
    profiles = {}
    for text in options.profile or USUAL_PROFILES:
        name, _, size = text.partition("=")
        share, _, last = size.partition("@")
        try:
            highest = None if not last else layers // 2 if last == "half" else int(last)
        except ValueError:
            raise UserError(f"--profile {text}: {last!r} is no layer; write NAME=SHARE@LAST") from None
        if name in profiles:
            raise UserError(f"--profile {text}: there is another profile {name}; give one of both another name")
        profiles[name] = profile_of(name, share, layers, highest)
    return list(profiles.values())


def profile_of(name: str, share: str, layers: int, last: int | None) -> Profile:
    """The profile of a share of the layers, with none above `last`.

    Raises:
        UserError: there is no such share, or the name means something else.
    """
    from skvr_dist.evaluate.cache_plan import Profile
    from skvr_dist.routing import CacheStrategy

    try:
        of_layers = Fraction(share)
    except (ValueError, ZeroDivisionError):
        of_layers = Fraction(0)
    if not 0 < of_layers <= 1:
        raise UserError(f"profile {name}={share} must name a share of the layers, above 0 and at most 1, such as 1/3")
    if not name or CacheStrategy.is_spec(name):
        raise UserError(f"a profile cannot be called {name!r}; write NAME=SHARE, such as bulk=0.2")
    highest = layers - 1 if last is None else last
    # A share is a budget; it is not rounded up, but one layer is the least.
    return Profile(name, max(1, min(int(of_layers * layers + Fraction(1, 10**9)), highest + 1)), last)


def _texts(checkpoint: Checkpoint, given: list[str | None], length: int | None) -> dict[str, HeldOutData]:
    """Texts by name; the name of one without is that of its folder."""
    from skvr_dist.evaluate.curve import HeldOutData

    texts: dict[str, HeldOutData] = {}
    for text in given:
        name, named, folder = (text or "").partition("=")
        if named and ("/" in name or Path(text or "").is_dir()):  # a path may hold the sign too
            named = ""
        held_out = HeldOutData.of(checkpoint, (folder if named else text), length)
        held_out.require_fits(checkpoint)
        name = name if named else held_out.location.rstrip("/").rpartition("/")[2]
        if name in texts:
            raise UserError(f"two texts are called {name}; give them names, as NAME=FOLDER")
        texts[name] = held_out
    return texts


def _require_apart(searched: dict[str, list[MicroBatch]], tested: dict[str, list[MicroBatch]]) -> None:
    from skvr_dist.evaluate.overlap import shared_share

    for one, calibration in searched.items():
        for other, test in tested.items():
            if (share := shared_share(calibration, test)) > _MOST_OVERLAP:
                raise UserError(
                    f"{share:.0%} of the calibration text {one} stands in the test text {other}, so the test would say "
                    f"nothing; give texts that have at most {_MOST_OVERLAP:.0%} in common"
                )


def _described(text: HeldOutData, batches: list[MicroBatch]) -> dict[str, Any]:
    return {
        "data": text.location,
        "data_fingerprint": text.fingerprint,
        "sequences": sum(len(batch.tokens) for batch in batches),
        "sequence_length": text.sequence_length,
    }


def _bytes_per_layer(checkpoint: Checkpoint) -> int:
    from skvr_dist.evaluate.retention import CACHE_BYTES_PER_ELEMENT
    from skvr_dist.routing import CacheStrategy

    model = checkpoint.model_config
    return CacheStrategy(model.num_hidden_layers, (0,)).cache_bytes_per_token(
        kv_heads=model.num_key_value_heads, head_dim=model.head_dim, bytes_per_element=CACHE_BYTES_PER_ELEMENT
    )


def _table(plan: CachePlan, test: str, layers: int, bytes_per_layer: int) -> str:
    """One test text: what each profile costs there, and what it saves against other choices of as many layers."""
    rows = []
    for planned in plan.profiles:
        tested = planned.tested[test]
        gains = [_gain(planned, kind, test) for kind in ("evenly spaced", "one-shot scores", "random")]
        size = planned.profile.size
        rows.append(
            [
                planned.profile.name,
                planned.calibration,
                f"{size} of {layers}",
                f"{size * bytes_per_layer:,}",
                ",".join(map(str, planned.retained)),
                f"{tested.loss:.4f}",
                f"{tested.rise.mean:+.4f} ({tested.rise.low:+.4f} to {tested.rise.high:+.4f})",
                *gains,
            ]
        )
    headers = ["profile", "searched on", "layers", "cache bytes/token", "that keep it", "loss", "rise over full"]
    headers += ["saves against evenly spaced", "against one-shot scores", "against random"]
    title = f"Tested on {test}: {plan.full_loss[test]:.4f} nats per token at full retention"
    return f"{title}\n\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _front_table(plan: CachePlan, calibration: str, bytes_per_layer: int) -> str:
    """The sets that were tried on a text and that none of their size or below beats there."""
    rows = [
        [
            str(size),
            f"{size * bytes_per_layer:,}",
            f"{point.calibration_loss:.4f}",
            ",".join(map(str, point.retained)),
        ]
        for size, point in plan.front[calibration].items()
    ]
    headers = ["layers", "cache bytes/token", f"loss on {calibration}", "that keep it"]
    title = f"Pareto front of the sets that were tried on {calibration}"
    return f"{title}\n\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _gain(planned: PlannedProfile, kind: str, test: str) -> str:
    rival = planned.rivals.get(kind)
    if rival is None:
        return ""
    if rival.retained == [planned.retained]:
        return "the same"
    gain = rival.gain[test]
    return f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def _figures(plan: CachePlan, most_rise: float | None) -> list[Figure]:
    if most_rise is None:
        return []
    return [
        Figure(
            f"{planned.profile.name} (searched on {planned.calibration}) costs {tested.rise.mean:+.4f} nats on {test}",
            f"<= {most_rise:+.4f}",
            tested.rise.mean <= most_rise,
        )
        for planned in plan.profiles
        for test, tested in planned.tested.items()
    ]


def _sharing(plan: CachePlan) -> str:
    return "\n".join(
        f"searched on {name}: {cost.measured_sets} sets for {cost.evaluated_layers} layers over the text, "
        f"{cost.layers_without_sharing} if each set were run alone"
        for name, cost in plan.cost.items()
    )


def _plain(value: Any) -> Any:
    """With keys that JSON has: the sizes of the front are numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
