"""Families of models that can be cut: each file makes the stages of one class, or of a few that are built alike."""
