"""Any routing that a configuration can ask for, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from skvr_dist.routing import POLICIES, RoutingConfig

PARAMETERS = {"cross_layer_prob": st.floats(0, 1), "window": st.integers(1, 40), "group_size": st.integers(2, 40)}
ROUTINGS = st.one_of(
    *(
        st.builds(RoutingConfig, policy=st.just(name), **{each: PARAMETERS[each] for each in policy.parameters})
        for name, policy in POLICIES.items()
    )
)
