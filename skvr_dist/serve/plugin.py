"""The entry point of vLLM's plugin system (`vllm.general_plugins`), called in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Replace vLLM's model classes by ours, which do the same unless a configuration names a cache strategy."""
    from vllm import ModelRegistry

    # Importing it teaches AutoConfig the types of pruned checkpoints.
    import skvr_dist.hf  # noqa: F401
    from skvr_dist.config.families import FAMILIES

    for family in FAMILIES.values():
        # By name: vLLM imports models late, after it has chosen a device.
        for architecture in (family.causal_lm, f"Pruned{family.causal_lm}"):
            ModelRegistry.register_model(architecture, f"skvr_dist.serve.models:Shared{family.causal_lm}")
