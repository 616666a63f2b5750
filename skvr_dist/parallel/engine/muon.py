"""Imports DeepSpeed's Muon optimizer, which no run here has, without compiling its functions."""

from __future__ import annotations

import os

_SWITCH = "TORCHDYNAMO_DISABLE"
"""Read by torch.compile when a function is decorated (torch/_dynamo/eval_frame.py)."""


def import_muon_uncompiled() -> None:
    """Import it before an engine is built, which does so to find out that its optimizer is another one.

    The import alone decorates three functions with torch.compile, for which torch imports all of Inductor: 1.3 s of
    each rank's start (torch 2.13.0, DeepSpeed 0.19.8), for nothing where layers are not compiled.
    """
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:
        pass  # a DeepSpeed that has none, or has it elsewhere
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
