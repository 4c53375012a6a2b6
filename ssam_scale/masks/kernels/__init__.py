"""Loops over single weights, compiled by numba for the CPU."""
