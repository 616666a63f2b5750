"""The `routing:` section: which donors are drawn in training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from skvr_dist.routing.policies import POLICIES, PolicyName
from skvr_dist.schedule import Share, in_words
from skvr_dist.section import Section

_PARAMETERS = tuple(dict.fromkeys(name for policy in POLICIES.values() for name in policy.parameters))


class RoutingConfig(Section):
    """Which donors are drawn in training: a policy and its parameters."""

    policy: PolicyName
    """The rule that draws each layer's donor (`skvr_dist.routing.policies`, docs/draws.md)."""
    cross_layer_prob: Share | None = None
    """Probability that a layer l > 0 reads a donor (the p of the paper's Table 1; 0 is standard training)."""
    full_retention_share: Share = 0.0
    """Share of the micro-batches (or sequences, as draws_per says) in which every layer reads its own, drawn for each.

    With a cross_layer_prob only."""
    draws_per: Literal["micro_batch", "sequence"] = "micro_batch"
    """What draws donors of its own: each micro-batch, or each sequence of it (with a cross_layer_prob only).

    With sequence, donors do not depend on train.micro_batch_size: they are those of micro-batches of one sequence."""
    window: int | None = Field(default=None, ge=1, le=10**9)
    """Layers below the reader that may be its donor (policy `window`)."""
    group_size: int | None = Field(default=None, ge=2, le=10**9)
    """Consecutive layers that share the first one's keys and values (policies `cla` and `rd_cla`)."""

    @model_validator(mode="after")
    def _parameters_fit_policy(self) -> RoutingConfig:
        policy = POLICIES[self.policy]
        parameters = {name: value for name, value in self if name in _PARAMETERS}
        takes = " and ".join(policy.parameters) or "no parameters"
        for name, value in parameters.items():
            if name in policy.parameters and value is None:
                raise ValueError(f"policy {self.policy} needs {name}")
            if name not in policy.parameters and value is not None:
                raise ValueError(f"policy {self.policy} takes {takes}, but {name} is {value}; set it to null")
        if self.full_retention_share != 0.0 and not policy.is_random:
            share = self.full_retention_share
            raise ValueError(f"policy {self.policy} takes {takes}, but full_retention_share is {share}; set it to 0")
        if self.draws_per != "micro_batch" and not policy.is_random:
            raise ValueError(
                f"policy {self.policy} takes {takes}, but draws_per is {self.draws_per}; set it to micro_batch"
            )
        return self


def parameters_in_words(routing: RoutingConfig) -> dict[str, str]:
    """The parameters of the policy and what they are set to, for tables."""
    return {
        name: in_words(getattr(routing, name)) for name in routing.model_dump(exclude_defaults=True) if name != "policy"
    }
