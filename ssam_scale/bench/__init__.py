"""Benchmarks: time, memory and bytes of a part of the package, next to the usual alternative in the same run."""
