"""Lets Triton interpret the kernels, which it decides where they are defined: in a process of these tests alone."""

import os

os.environ["TRITON_INTERPRET"] = "1"
