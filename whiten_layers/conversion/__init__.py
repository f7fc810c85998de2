"""Conversion of a model: its layers to whitened twins and back, its normalizations, and the analysis this needs."""
