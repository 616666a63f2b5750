"""A command line as one word that no shell changes: pdsh has the shell of every host read the words again."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from skvr_dist.errors import UserError

OPTION = "--packed-arguments="


def pack(words: Sequence[str]) -> str:
    """One word for all of these, of letters, digits, `=`, `-` and `_`."""
    return OPTION + base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def unpack(words: Sequence[str]) -> list[str]:
    """A command line with its packed words in the place of their pack.

    Raises:
        UserError: a pack is damaged.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith(OPTION):
            found.append(word)
            continue
        try:
            found += [str(each) for each in json.loads(base64.urlsafe_b64decode(word.removeprefix(OPTION)))]
        except ValueError as error:
            raise UserError(
                f"{word[:60]} is no packed command line ({error}); let tools/preflight.py write it"
            ) from None
    return found
