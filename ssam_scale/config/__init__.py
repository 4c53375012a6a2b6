"""The description of a run: its sections, and how it is read (`load.load`: a YAML file with overrides).

Masks and schedules are made from their sections without PyYAML, so nothing is imported here.
"""
