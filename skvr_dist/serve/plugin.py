"""The entry point of vLLM's plugin system (`vllm.general_plugins`), called in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Put our model classes in the place of vLLM's own, which they are unless a configuration speaks of caches."""
    from vllm import ModelRegistry

    # Importing it teaches AutoConfig the types of pruned checkpoints.
    import skvr_dist.hf  # noqa: F401

    for family in ("Qwen3", "Llama", "Mistral"):
        # By name: vLLM imports models late, after it has chosen a device.
        for architecture in (f"{family}ForCausalLM", f"Pruned{family}ForCausalLM"):
            ModelRegistry.register_model(architecture, f"skvr_dist.serve.models:Shared{family}ForCausalLM")
