"""The parts of gpu_bench.py."""
