"""Imports ahead what building an engine would import on every rank, for seconds: for servers that fork ranks."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  compiles a function, so it imports torch's compiler
import torch._dynamo  # noqa: F401  torch's optimizers

# Nothing of this is ever freed, so a rank's collector need not walk through it, nor copy the pages that it is on.
gc.collect()
gc.freeze()
