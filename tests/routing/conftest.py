"""Properties are held without a limit of time per example: how long one takes depends on who shares the cores."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
