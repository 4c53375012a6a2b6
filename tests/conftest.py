"""What holds for every test."""

import os

# The networks here are too small to gain from a second thread, and waiting threads take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
