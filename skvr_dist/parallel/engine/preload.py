"""Imports ahead what building an engine would import on every rank, for seconds: for servers that fork ranks."""

import gc

import torch._dynamo  # noqa: F401  torch's optimizers

from skvr_dist.parallel.engine.muon import import_muon_uncompiled

import_muon_uncompiled()

# Nothing of this is ever freed, so a rank's collector need not walk through it, nor copy the pages that it is on.
gc.collect()
gc.freeze()
