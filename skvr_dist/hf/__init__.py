"""Hugging Face: exports that transformers loads without any code of ours."""

from skvr_dist.hf.card import Training
from skvr_dist.hf.export import ExportMismatchError, ExportReport, export_model

__all__ = ["ExportMismatchError", "ExportReport", "Training", "export_model"]
