"""What a model from elsewhere brought along besides its weights, and how it travels from checkpoint to checkpoint.

That is the files of its tokenizer with the chat template, its settings of generation, and the special tokens that its
config.json names. An import stores them, a run that starts from it stores them again, and an export has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skvr_dist.checkpoint.folder import IMPORTED_TOKENIZER_FILE, TOKENIZER_FILE, Checkpoint
from skvr_dist.data.tokenizers.base import Tokenizer, spell_alike
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    IMPORTED_TOKENIZER_FILE,
    "tokenizer_config.json",
    TOKENIZER_FILE,
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face checkpoint that describe its tokenizer."""
TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder of further chat templates, `NAME.jinja`."""


@dataclass(frozen=True)
class Brought:
    """Files by name, relative to the checkpoint, and ids of special tokens."""

    files: dict[str, bytes] = field(default_factory=dict)
    special_ids: dict[str, Any] | None = None
    """`bos_token_id`, `eos_token_id` (one or several) and `pad_token_id`, those of them that config.json named."""

    @property
    def names_tokenizer(self) -> bool:
        """Whether the model came with a tokenizer."""
        return any(name != GENERATION_FILE for name in self.files)


NOTHING_BROUGHT = Brought()


def brought_by(checkpoint: Checkpoint) -> Brought:
    """What a checkpoint holds of a model from elsewhere; nothing if training began here."""
    if checkpoint.facts.imported_from is None:
        return NOTHING_BROUGHT
    # Without a tokenizer of its own a checkpoint has that of its data.
    own = {TOKENIZER_FILE} if checkpoint.is_trained and IMPORTED_TOKENIZER_FILE not in checkpoint.files else set()
    names = [name for name in checkpoint.files if _is_brought(name) and name not in own]
    return Brought({name: (checkpoint.folder / name).read_bytes() for name in names}, checkpoint.facts.special_ids)


def _is_brought(name: str) -> bool:
    return name in (*TOKENIZER_FILES, GENERATION_FILE) or name.startswith(f"{TEMPLATES_FOLDER}/")


def tokenizer_of_other_texts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Tokenizer | None:
    """A checkpoint's tokenizer, if ids of the data mean other texts to it; None too if no data is made with its own.

    Args:
        tokenizer: that of the data.
    """
    if checkpoint.tokenizer_file is None:
        return None
    try:
        theirs = load_tokenizer(checkpoint.tokenizer_file)
    except UserError:  # it came along with an import, or is damaged, which is found when the checkpoint is read
        return None
    return None if spell_alike(theirs, tokenizer) else theirs


def to_travel_on(checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> tuple[Brought, str | None]:
    """What the checkpoints of a run take over from the one that it starts from, and what is lost, in a sentence.

    Ids of tokens mean something with their tokenizer alone, so all of it is left behind if the data has another one.

    Args:
        checkpoint: an import, a run's checkpoint, or None for a run that starts from nothing.
        tokenizer: that of the data.
    """
    brought = NOTHING_BROUGHT if checkpoint is None else brought_by(checkpoint)
    if checkpoint is None or not brought.names_tokenizer or checkpoint.tokenizer_file is None:
        return brought, None
    try:
        theirs = load_tokenizer(checkpoint.tokenizer_file).sha256
    except UserError:  # data cannot be made with it
        theirs = "of another kind"
    if theirs == tokenizer.sha256:
        return brought, None
    return NOTHING_BROUGHT, (
        f"{checkpoint.folder} came with a tokenizer {theirs[:15]}, but the data has {tokenizer.sha256[:15]}: its "
        f"special tokens (eos, pad), chat template and settings of generation are left behind"
    )
