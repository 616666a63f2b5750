"""Export: a plain checkpoint of a model's family that serves any strategy, published only if it checks out."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as FastTokenizer
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from skvr_dist.checkpoint.brought import GENERATION_FILE, NOTHING_BROUGHT, Brought
from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig
from skvr_dist.data.tokenizers.hugging_face import HuggingFaceTokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import prove_new_folder, published
from skvr_dist.hf.convert.brought_files import copy_brought, open_tokenizer
from skvr_dist.hf.convert.bundle import add_code, describe_routing
from skvr_dist.hf.convert.card import Training, model_card
from skvr_dist.hf.convert.check import DECODING_TOLERANCE, SAMPLE_TEXTS, TOLERANCE, CheckReport, check_export
from skvr_dist.hf.convert.model_config import hf_config, write_config
from skvr_dist.hf.convert.tokenizer import convert_tokenizer, special_ids, write_tokenizer
from skvr_dist.hf.convert.weights import WeightReader, check_names, parameter_shapes, pruned_names, write_weights
from skvr_dist.routing import POLICIES, CacheStrategy, RoutingConfig
from skvr_dist.schedule import bounds_of, in_words


@dataclass(frozen=True)
class ExportReport:
    """An export and the figures of its check."""

    file_bytes: dict[str, int]
    parameters: int
    dtype: torch.dtype
    """Dtype of all weights, or of most of the parameters."""
    check: CheckReport
    left_behind: str | None = None
    """What the tokenizer of the data once had and the export has not, in words."""

    def figures(self) -> dict[str, object]:
        """Everything as plain values."""
        return {
            "file_bytes": self.file_bytes,
            "parameters": self.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            **asdict(self.check),
            "relative_logit_difference": self.check.relative_logit_difference,
            "tolerance": TOLERANCE,
            "decoding_tolerance": DECODING_TOLERANCE,
            "failures": self.check.failures(),
        }


class ExportMismatchError(Exception):
    """The reloaded export is not the trained model; nothing was published. `report` has the figures."""

    def __init__(self, report: ExportReport) -> None:
        super().__init__(f"the export does not match its checkpoint: {'; '.join(report.check.failures())}")
        self.report = report


def export_model(
    config: ModelConfig,
    names: Collection[str],
    weight: WeightReader,
    tokenizer_file: Path | None,
    output: Path,
    *,
    training: Training,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    max_shard_size: str = "5GB",
    pruned_to: CacheStrategy | None = None,
    brought: Brought = NOTHING_BROUGHT,
) -> ExportReport:
    """Write a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, if it checks out.

    Args:
        config: of the decoder that was trained.
        names: canonical names of all weights there are.
        weight: the tensor of a canonical name; called several times for each.
        tokenizer_file: a data set's `tokenizer.model`; or a `tokenizer.json`, which is copied with the files beside it
            that belong to it; or None for a model without one.
        output: the folder to make; it may exist if it is empty.
        training: what the model card tells.
        dtype: of the stored weights, one for all or one for each canonical name.
        max_shard_size: of a weight file, such as "5GB".
        pruned_to: leave out what this strategy does not use. Such a checkpoint needs the code that is written with
            it, and serves that strategy and those that retain fewer of its layers.
        brought: what the model brought along; its special tokens come before the tokenizer's.

    Raises:
        UserError: `output` holds something or cannot be written, the training never ran at full retention, weights are
            missing, unexpected or of another shape, or the tokenizer cannot be converted exactly.
        ExportMismatchError: what transformers loads differs from what was trained.
    """
    output = prove_new_folder(output)
    _check_routing(training.routing, pruned_to)
    tokenizer = None if tokenizer_file is None else _open_tokenizer(tokenizer_file, config, pruned_to is None)
    shapes = _exported_shapes(config, names, pruned_to)
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else {name: dtype[name] for name in shapes}
    main_dtype = _main_dtype(shapes, dtypes)
    parameters = sum(shape.numel() for shape in shapes.values())
    ids = {**(special_ids(tokenizer) if tokenizer else {}), **(brought.special_ids or {})}
    published_config = hf_config(config, main_dtype, ids, pruned_to)
    describe_routing(published_config, training)
    with published(output) as folder:
        write_weights(folder, shapes, weight, dtypes, max_shard_size)
        _write_configs(folder, published_config, ids, brought)
        if tokenizer_file is not None:
            _write_tokenizer_files(folder, tokenizer_file, tokenizer)
        card = model_card(folder.name, config, parameters, training, tokenizer_file, pruned_to)
        (folder / "README.md").write_text(card, encoding="utf-8")
        compared = tokenizer_file if tokenizer_file is not None and _is_ours(tokenizer_file) else None
        check = check_export(folder, config, weight, dtypes, compared, pruned_to)
        report = ExportReport(_sizes(folder), parameters, main_dtype, check, _left_behind(tokenizer_file))
        if check.failures():
            raise ExportMismatchError(report)
    return report


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file, by its path in the folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _write_configs(folder: Path, published_config: PreTrainedConfig, ids: Mapping[str, Any], brought: Brought) -> None:
    """config.json with its code; and the settings of generation that the model brought along, or its tokens' alone."""
    add_code(folder, published_config, published_config.architectures[0])
    write_config(folder, published_config)
    if GENERATION_FILE in brought.files:
        (folder / GENERATION_FILE).write_bytes(brought.files[GENERATION_FILE])
    else:
        GenerationConfig(**ids).save_pretrained(folder)


def _is_ours(tokenizer_file: Path) -> bool:
    """Whether the file is a data set's tokenizer.model, which is converted; somebody else's is copied."""
    return tokenizer_file.suffix == ".model" and not (tokenizer_file.parent / "tokenizer_config.json").exists()


def _left_behind(tokenizer_file: Path | None) -> str | None:
    """What a data set does not keep of a Hugging Face tokenizer."""
    if tokenizer_file is None or not _is_ours(tokenizer_file):
        return None
    if not isinstance(load_tokenizer(tokenizer_file), HuggingFaceTokenizer):
        return None
    return (
        "the data kept its end (eos) and padding tokens, but no chat template, and names of special tokens are plain "
        "text; --tokenizer FOLDER takes all along"
    )


def _open_tokenizer(file: Path, config: ModelConfig, whole: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers has it, for a model of its family or, if not `whole`, a pruned one.

    Raises:
        UserError: the model has fewer tokens, or transformers would make another tokenizer of it for this family.
    """
    tokenizer: PreTrainedTokenizerBase
    if _is_ours(file):
        tokenizer = convert_tokenizer(file, config.max_position_embeddings)
    else:
        tokenizer = open_tokenizer(file.parent)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"tokenizer {file} has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}; export "
            f"with the tokenizer that the model was trained with"
        )
    forced = FAMILIES[config.architecture].tokenizer_class
    if whole and forced is not None and _changes(file, tokenizer, forced):
        raise UserError(
            f"transformers loads the tokenizer of any {config.architecture} model as {forced}, which gives other ids "
            f"than {file}; export the weights without a tokenizer, or train another architecture with this one"
        )
    return tokenizer


def _changes(file: Path, tokenizer: PreTrainedTokenizerBase, tokenizer_class: str) -> bool:
    """Whether a class of transformers gives texts other ids than the tokenizer.json that it would be loaded from."""
    with tempfile.TemporaryDirectory() as temporary:
        _write_tokenizer_files(Path(temporary), file, tokenizer)
        found = getattr(transformers, tokenizer_class).from_pretrained(temporary, local_files_only=True)
        wanted = FastTokenizer.from_file(f"{temporary}/tokenizer.json")
    return any(
        found(text, add_special_tokens=False)["input_ids"] != wanted.encode(text, add_special_tokens=False).ids
        for text in SAMPLE_TEXTS
    )


def _write_tokenizer_files(folder: Path, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if _is_ours(file):
        write_tokenizer(folder, tokenizer)
    else:
        copy_brought(file.parent, folder)


def _exported_shapes(
    config: ModelConfig, names: Collection[str], pruned_to: CacheStrategy | None
) -> dict[str, torch.Size]:
    """Shapes of the weights to write, by canonical name; raises `UserError` if `names` are not those of the model."""
    shapes = parameter_shapes(hf_config(config, torch.float32, {}))
    check_names(names, shapes, config.architecture, "export with the model section that the weights were trained with")
    unused = set() if pruned_to is None else pruned_names(pruned_to)
    return {name: shape for name, shape in shapes.items() if name not in unused}


def _main_dtype(shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most of the parameters."""
    elements: Counter[torch.dtype] = Counter()
    for name, shape in shapes.items():
        elements[dtypes[name]] += shape.numel()
    return elements.most_common(1)[0][0]


def _check_routing(routing: RoutingConfig, pruned_to: CacheStrategy | None) -> None:
    """Raises `UserError` if in training some layers never read their own keys and values, which the export reads."""
    if pruned_to is not None:
        return
    prob = routing.cross_layer_prob
    always_elsewhere = (
        prob is not None and bounds_of(prob)[0] == 1.0 and bounds_of(routing.full_retention_share)[1] == 0.0
    )
    if not POLICIES[routing.policy].reads_own or always_elsewhere:
        what = "its fixed groups" if prob is None else f"cross_layer_prob {in_words(prob)}"
        raise UserError(
            f"a model trained by policy {routing.policy} with {what} cannot run at full retention: some layers have "
            f"never read their own keys and values; train with a cross_layer_prob below 1"
        )
