"""The `routing:` section: which donors are drawn in training."""

from __future__ import annotations

from pydantic import Field, model_validator

from skvr_dist.routing.policies import POLICIES, PolicyName
from skvr_dist.schedule import Share, in_words
from skvr_dist.section import Section


class RoutingConfig(Section):
    """Which donors are drawn in training: a policy and its parameters."""

    policy: PolicyName
    """The rule that draws each layer's donor (`skvr_dist.routing.policies`, docs/draws.md)."""
    cross_layer_prob: Share | None = None
    """Probability that a layer l > 0 reads a donor (the p of the paper's Table 1; 0 is standard training)."""
    full_retention_share: Share = 0.0
    """Share of the micro-batches in which every layer reads its own, drawn for each (with a cross_layer_prob only)."""
    window: int | None = Field(default=None, ge=1)
    """Layers below the reader that may be its donor (policy `window`)."""
    group_size: int | None = Field(default=None, ge=2)
    """Consecutive layers that share the first one's keys and values (policies `cla` and `rd_cla`)."""

    @model_validator(mode="after")
    def _parameters_fit_policy(self) -> RoutingConfig:
        policy = POLICIES[self.policy]
        parameters = {name: value for name, value in self if name not in ("policy", "full_retention_share")}
        takes = " and ".join(policy.parameters) or "no parameters"
        for name, value in parameters.items():
            if name in policy.parameters and value is None:
                raise ValueError(f"policy {self.policy} needs {name}")
            if name not in policy.parameters and value is not None:
                raise ValueError(f"policy {self.policy} takes {takes}, but {name} is {value}; set it to null")
        if self.full_retention_share != 0.0 and not policy.is_random:
            share = self.full_retention_share
            raise ValueError(f"policy {self.policy} takes {takes}, but full_retention_share is {share}; set it to 0")
        return self


def parameters_in_words(routing: RoutingConfig) -> dict[str, str]:
    """The parameters of the policy and what they are set to, for tables."""
    return {
        name: in_words(getattr(routing, name)) for name in routing.model_dump(exclude_defaults=True) if name != "policy"
    }
