"""Fine-tune a model with stochastic KV routing on questions about contexts, or on chats.

    deepspeed --num_gpus 8 launch/finetune.py --from runs/imported --config paper-finetune
    python launch/finetune.py --from runs/imported --config paper-finetune data.train.squad.path=train-v2.0.json

CHECKPOINT is an imported model (tools/import_hf.py) or a checkpoint of a run; its model section, its weights and its
tokenizer are what the configuration begins with. `--config` is a YAML file or the name of a preset, and may be given
several times, later ones win; `section.key=value` overrides a key. docs/finetuning.md has the formats of examples.
"""

from __future__ import annotations

from skvr_dist.command import a_path, parse, run_command
from skvr_dist.commands.pretrain import train_as_asked, training_parser
from skvr_dist.errors import UserError


def main() -> None:
    """Entry point."""
    run_command(run, over_ranks=True)


def run() -> None:
    """Fine-tune, or show what would be trained.

    Raises:
        UserError: there is nothing to start from, or nothing to fine-tune on.
    """
    parser = training_parser(__doc__)
    parser.add_argument("--from", dest="start", type=a_path, metavar="CHECKPOINT", help="the model to start from")
    options = parse(parser)

    from skvr_dist.checkpoint.base import base_of
    from skvr_dist.config.load import load_config

    base = base_of(options.start) if options.start else None
    config = load_config(options.config, options.overrides, base=base)
    if config.train.initial_weights is None:
        raise UserError("fine-tuning starts from a model, but none is named; give --from CHECKPOINT")
    if not any(source.has_examples for source in config.data.train.values()):
        names = ", ".join(f"data.train.{name}.format" for name in config.data.train)
        raise UserError(
            f"fine-tuning reads examples, but all of data.train are shards; set one of {names}, or use "
            f"launch/pretrain.py"
        )
    train_as_asked(options, config)


if __name__ == "__main__":
    main()
