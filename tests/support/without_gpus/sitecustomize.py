"""Imported by every Python that starts with this folder on PYTHONPATH, before anything could look for a GPU.

An environment variable alone is not enough: DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for the processes it starts.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
