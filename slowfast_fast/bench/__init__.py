"""Benchmarks: ours against stock at the shapes of SlowFast, interleaved in one process. `bench` is the entry."""

from .main import bench

__all__ = ["bench"]
