"""The base of every configuration section: strict, immutable, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A node of the configuration tree.

    Strict: a string is never taken for a number, and an unknown key is an error. Frozen: what was
    validated is what runs. Each part of the library declares its own section beside the code that
    reads it; `skvr_dist.config.tree.Config` is the tree.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
