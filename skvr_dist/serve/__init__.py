"""Serving exports at any cache strategy: the vLLM plugin."""
