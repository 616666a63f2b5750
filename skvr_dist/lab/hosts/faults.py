"""What clusters do to a run: hosts vanish, links are cut, ranks stand still. Each is a row of the table of faults."""

from __future__ import annotations

from skvr_dist.lab.hosts.case import Case

FAULTS: list[Case] = []
