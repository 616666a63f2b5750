"""Imports what making an engine imports otherwise, for seconds on every rank: for servers that fork ranks."""

import torch._dynamo  # noqa: F401  torch's optimizers
