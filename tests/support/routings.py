"""Any routing that a configuration can ask for, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from skvr_dist.routing import POLICIES, RoutingConfig
from skvr_dist.schedule import Schedule

SCHEDULE_STEPS = 100
"""Steps that schedules over shares of a run are spread over."""
SCHEDULES = st.builds(
    lambda unit, points: Schedule(unit=unit, points=sorted(points)),
    st.sampled_from(["share", "steps"]),
    st.lists(
        st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=4, unique_by=lambda point: point[0]
    ),
)
RATES = st.floats(0, 1) | SCHEDULES
_PARAMETERS = {"cross_layer_prob": RATES, "window": st.integers(1, 40), "group_size": st.integers(2, 40)}
ROUTINGS = st.one_of(
    *(
        st.builds(
            RoutingConfig,
            policy=st.just(name),
            **{each: _PARAMETERS[each] for each in policy.parameters},
            **({"full_retention_share": RATES} if policy.is_random else {}),
        )
        for name, policy in POLICIES.items()
    )
)
