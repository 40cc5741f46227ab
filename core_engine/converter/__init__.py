"""Quantized model folders, made from plain ones; what stands behind ``quire quantize``."""
