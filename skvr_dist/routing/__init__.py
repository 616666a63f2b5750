"""Routing: policies, plans, liveness and cache strategies. Pure: no torch, no process groups."""

from skvr_dist.routing.config import RoutingConfig, parameters_in_words
from skvr_dist.routing.liveness import KVPart, crossing_elements, crossing_layers, crossing_parts, read_layers
from skvr_dist.routing.plan import RoutingPlan, draw_plan, fixed_plan
from skvr_dist.routing.policies import POLICIES, Policy
from skvr_dist.routing.strategy import CacheStrategy

__all__ = [
    "POLICIES",
    "CacheStrategy",
    "KVPart",
    "Policy",
    "RoutingConfig",
    "RoutingPlan",
    "crossing_elements",
    "crossing_layers",
    "crossing_parts",
    "draw_plan",
    "fixed_plan",
    "parameters_in_words",
    "read_layers",
]
