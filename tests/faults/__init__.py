"""Random faults in real trainings, which have to end as the uninterrupted one does: `python -m tests.faults`."""
