"""Where results are recorded and compared: trackers, phase timers, savings. The only package that imports MLflow.

`run.open_run` opens a run, which its trackers record (`tracker.py`, one file each in `trackers/`), `timer.PhaseTimer`
times a step, `compare.compare` reads finished runs back. Nothing here imports MLflow until a store is opened, so ranks
that do not track never pay for it, nor do runs that it does not record.
"""
