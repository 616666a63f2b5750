"""The base of every configuration section: strict, immutable, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A node of the configuration tree.

    Strict: a string is never taken for a number, and an unknown key is an error. Frozen: what was validated is what
    runs. The text below a field is its description (docs/configuration.md). The tree is `skvr_dist.config.tree.Config`.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
