"""A pretended GPU: torch's CUDA code paths, run for real on a CPU build of torch, with real values.

`device.cpp` is a CUDA device whose memory is the host's and whose operators run on the CPU; `cuda.py` and `nccl.py` put
in place what torch lacks in such a build; `watch.py` notes what a GPU would have done: launches by phase, waits of the
host, streams that were not made to wait. A process pretends from its start to its end:

    python -m tests.support.pretended_gpu -m pytest -m gpu tests/sharding

Tests in `tests/gpu_simulated` run so by themselves (`tests/gpu_simulated/conftest.py`).

What it cannot show: kernels (their results, their time, their memory), real races, and what only CUDA's own operators
do, as cuDNN's choices.
"""
