"""Hosts on one machine, made of namespaces: where launchers, batch systems and faults are tried for real."""
