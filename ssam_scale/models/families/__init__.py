"""Families of timm models that can be cut: each file makes the stages of one class."""
