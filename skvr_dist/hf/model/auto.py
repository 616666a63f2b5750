"""Which class `AutoModelForCausalLM` makes of a checkpoint: ours if its configuration or the caller
names a cache strategy, else that of transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from skvr_dist.hf.convert.bundle import add_code
from skvr_dist.hf.model.causal_lm import RoutedForCausalLM
from skvr_dist.hf.model.families import CLASSES, FamilyClasses

_SPEAKS_OF_CACHES = ("kv_profiles", "kv_profile", "kv_source_layers")


class _Choice:
    """Stands for the plain and the routed class of a family where an Auto class expects one."""

    def __init__(self, classes: FamilyClasses) -> None:
        self._classes = classes
        self.__name__ = classes.routed.__name__  # of both

    def _class_for(self, config: PreTrainedConfig, asked: dict[str, Any]) -> Any:
        speaks = any(name in asked or hasattr(config, name) for name in _SPEAKS_OF_CACHES)
        return self._classes.routed if speaks else self._classes.plain

    def from_pretrained(self, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return self._class_for(config, kwargs).from_pretrained(*args, config=config, **kwargs)

    def _from_config(self, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return self._class_for(config, kwargs)._from_config(config, **kwargs)


def register() -> None:
    """Teach the Auto classes of this process our models, and these to be saved with their code."""
    RoutedForCausalLM.add_code = staticmethod(add_code)
    for classes in CLASSES.values():
        AutoModelForCausalLM.register(classes.plain.config_class, _Choice(classes), exist_ok=True)
        pruned_config = classes.pruned.config_class
        AutoConfig.register(pruned_config.model_type, pruned_config)
        AutoModelForCausalLM.register(pruned_config, classes.pruned)
