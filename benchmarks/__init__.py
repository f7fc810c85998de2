"""Benchmarks: each file answers one question, and is run as ``python -m benchmarks.NAME``."""
