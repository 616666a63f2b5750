"""Print the packages of this environment whose versions are not those of a requirements file, if any.

python .ci/newer.py requirements.txt

Left out are packages that the file does not name, and those that no test imports: type stubs and linters.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

_NOT_IMPORTED = re.compile(r"types-|mypy|ruff")

words = Path(sys.argv[1]).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
lines = [line.partition("--hash")[0] for line in words if not line.strip().startswith("#")]
pinned = [Requirement(line) for line in lines if line.strip()]
for each in pinned:
    if _NOT_IMPORTED.match(each.name) or (each.marker and not each.marker.evaluate()):
        continue
    try:
        found = importlib.metadata.version(each.name)
    except importlib.metadata.PackageNotFoundError:
        continue
    if found not in each.specifier:
        print(f"{each.name} {found} ({each.specifier})")
