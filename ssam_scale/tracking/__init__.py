"""Where results are recorded and compared: MLflow, phase timers, savings. The only package that imports MLflow.

`run.open_run` opens a run, `timer.PhaseTimer` times a step, `compare.compare` reads finished runs back. Nothing here
imports MLflow until a store is opened, so ranks that do not track never pay for it.
"""
