"""One question a file, each run as ``python -m benchmarks.NAME``."""
