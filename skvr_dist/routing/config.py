"""The `routing:` section: which donors are drawn in training."""

from __future__ import annotations

from pydantic import Field, model_validator

from skvr_dist.routing.policies import POLICIES, PolicyName
from skvr_dist.section import Section


class RoutingConfig(Section):
    """Which donors are drawn in training: a policy and its parameters."""

    policy: PolicyName
    """The rule that draws each layer's donor (`skvr_dist.routing.policies`, docs/draws.md)."""
    cross_layer_prob: float | None = Field(default=None, ge=0, le=1)
    """Probability that a layer l > 0 reads a donor (the p of the paper's Table 1; 0 is standard training)."""
    window: int | None = Field(default=None, ge=1)
    """Layers below the reader that may be its donor (policy `window`)."""
    group_size: int | None = Field(default=None, ge=2)
    """Consecutive layers that share the first one's keys and values (policies `cla` and `rd_cla`)."""

    @model_validator(mode="after")
    def _parameters_fit_policy(self) -> RoutingConfig:
        wanted = POLICIES[self.policy].parameters
        parameters = {name: value for name, value in self if name != "policy"}
        for name, value in parameters.items():
            if name in wanted and value is None:
                raise ValueError(f"policy {self.policy} needs {name}")
            if name not in wanted and value is not None:
                takes = " and ".join(wanted) or "no parameters"
                raise ValueError(f"policy {self.policy} takes {takes}, but {name} is {value}; set it to null")
        return self
