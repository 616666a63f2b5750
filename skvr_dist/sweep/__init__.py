"""Many runs from one experiment file: which they are, where they run, and what came of them (docs/experiments.md)."""
