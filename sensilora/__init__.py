"""Sensitivity-based LoRA rank allocation and variable-rank LoRA kernels."""

from sensilora.ops import use_backend

__version__ = "0.1.0"

__all__ = ["use_backend"]
