"""Distributed pretraining of decoders with stochastic KV routing (R-CLA, arXiv 2604.22782)."""

__version__ = "0.2.0"
