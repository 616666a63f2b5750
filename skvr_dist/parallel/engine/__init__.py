"""The one room that knows DeepSpeed: nothing else imports it, patches it or reads its private attributes."""

import os

import torch

# DeepSpeed chooses its accelerator when it is imported, and would look for one that this machine does not have.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
