"""Bridges to other libraries; the only modules that import peft and transformers."""
