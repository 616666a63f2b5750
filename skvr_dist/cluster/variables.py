"""Which variables of the shell that starts a run its ranks on all hosts get, and the file that carries them.

The deepspeed launcher passes those that begin with PYTHON or NCCL by itself, and those of a file (`.deepspeed_env`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

PASSED = (
    "CUDA_",
    "DS_",
    "FI_",
    "GLOO_",
    "HF_",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MASTER_PORT",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PATH",
    "PYTHON",
    "SKVR_",
    "TOKENIZERS_",
    "TORCH",
    "TRITON_",
    "UCX_",
)
"""Beginnings of the names of the variables that are passed."""
# What each host or launcher says for itself; and what belongs to nobody else on a host, whose `ps` shows it.
_KEPT = re.compile(r"CUDA_VISIBLE_DEVICES|DS_ENV_FILE|TORCHELASTIC_|.*(TOKEN(?!IZERS_)|SECRET|PASSWORD|_KEY)")
_SPECIAL = re.compile(r'([\\"$`])')
_LONGEST_SHOWN = 80


def passed_variables(environment: Mapping[str, str] = os.environ, also: Iterable[str] = ()) -> dict[str, str]:
    """The variables that ranks on all hosts get, by name.

    Args:
        also: names beside those that begin as in `PASSED`.
    """
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in also or name.startswith(PASSED)) and not _KEPT.match(name) and "\n" not in value
    }


def as_deepspeed_file(variables: Mapping[str, str]) -> str:
    """The content of a `.deepspeed_env` that gives these values.

    DeepSpeed puts a value with any unusual letter between double quotes, for the shell of each host; pdsh replaces what
    follows a percent sign.
    """
    escaped = {name: _SPECIAL.sub(r"\\\1", value).replace("%", "%%") for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in escaped.items())


def in_words(variables: Mapping[str, str]) -> str:
    """Variables on one line, long values cut."""
    shown = {
        name: value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
        for name, value in variables.items()
    }
    return " ".join(f"{name}={value}" for name, value in shown.items()) or "none"
