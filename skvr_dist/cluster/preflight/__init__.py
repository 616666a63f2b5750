"""Whether hosts can run together, found before anything starts: a probe on each, and what they say compared."""
