"""Measured claims: what a part of the package costs, next to the plain way of doing the same."""
