"""The one room that knows DeepSpeed: nothing else imports it, patches it or reads its private attributes."""

import os

import torch

from skvr_dist.errors import UserError

# DeepSpeed chooses its accelerator when it is imported, and would look for one that this machine does not have.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if (named := os.environ.get("DS_ACCELERATOR")) not in (None, "cpu", "cuda"):
    raise UserError(
        f"DS_ACCELERATOR in the environment is {named}, but runs train on cuda or cpu; set one, or unset it"
    )
if named == "cuda" and not torch.cuda.is_available():
    raise UserError(
        "DS_ACCELERATOR in the environment is cuda, but PyTorch sees no GPU here; set it to cpu, or unset it"
    )
