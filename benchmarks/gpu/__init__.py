"""Measurements on a GPU, started by `benchmarks/gpu.sh`; see docs/gpu.md."""
