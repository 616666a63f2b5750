"""Compile the kernels of `skvr_kernels` for GPUs that are not there, and look at what became of them.

    skvr-verify kernels --json kernels.json

Every kernel for compute capability 8.0 (A100), 8.6 (workstations), 9.0 (H100, H200) and 12.0 (the newest ones), at each
dtype and head size with tiles of its own. No thread may keep more outside its registers than `tiles.py` allows, shared
memory must suffice, and on 9.0 the matrix products of 16-bit dtypes must be of Hopper's own instructions. Needs the
package `skvr_kernels` (`pip install ./kernels`), and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_kernels.compiling import Compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compile and report; returns the exit code.

    Raises:
        UserError: a package is missing, or Triton would interpret.
    """
    for package, way_out in (("triton", "pip install triton"), ("skvr_kernels", "pip install ./kernels")):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is not installed; {way_out}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is 1, so that Triton compiles nothing; unset it")
    from skvr_kernels.compiling import compiled, configurations
    from tqdm import tqdm

    made = [compiled(*each) for each in tqdm(list(configurations()), leave=False, disable=None)]
    rows = [_row(each) for each in made]
    table = tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github")
    wrong = [each for each in made if each.misses]
    figure = Figure(f"{len(wrong)} of {len(made)} compiled kernels beyond a limit", "none", not wrong)
    record = [asdict(each) | {"misses": each.misses} for each in made]
    return conclude([figure], table=table, record=record, json_file=options.json)


def _row(each: Compiled) -> dict[str, object]:
    tiles = each.tiles
    return {
        "kernel": each.kernel,
        "capability": each.capability,
        "dtype": each.dtype,
        "head size": each.head_size,
        "tiles": f"{tiles.queries} x {tiles.keys}" if tiles.keys else str(tiles.queries),
        "warps": tiles.warps,
        "stages": tiles.stages,
        "registers": each.registers,
        "stack bytes": each.stack_bytes,
        "shared KiB": f"{each.shared_bytes / 1024:.1f}",
        "wgmma": each.wgmma or "-",
        "verdict": ", ".join(each.misses) or "ok",
    }
