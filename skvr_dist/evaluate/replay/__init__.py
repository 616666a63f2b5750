"""A trace of requests, replayed against servers at several cache strategies, and what came of it."""
