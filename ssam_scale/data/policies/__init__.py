"""Policies of augmentation: one file each, listed by `ssam-scale list policies`.

| file | question |
|---|---|
| `interface.py` | what is a policy? |
| any other | which operations does this one do, how often, and how much? |
"""

from .interface import POLICIES, Policy

__all__ = ["POLICIES", "Policy"]
