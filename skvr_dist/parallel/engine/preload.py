"""Imports ahead what building an engine would import on every rank, for seconds: for servers that fork ranks."""

import torch._dynamo  # noqa: F401  torch's optimizers
