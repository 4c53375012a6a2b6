"""How sharp a minimum is: SAM's gap, eigenvalues and trace of the Hessian, and the loss along random directions.

What is here computes with a network, batches and vectors, and reads or writes nothing. `train/sharpness.py` takes them
from a run, `trained/sharpness.py` from checkpoints; `tracking/landscape.py` draws.
"""

from ssam_scale.sharpness.hutchinson import Trace, trace
from ssam_scale.sharpness.lanczos import Eigenvalues, largest_eigenvalues
from ssam_scale.sharpness.landscape import curve, filter_normalized, plane
from ssam_scale.sharpness.loss import BatchLoss, MeanLoss
from ssam_scale.sharpness.measure import Measures, Sharpness, measure
from ssam_scale.sharpness.vectors import Vectors

__all__ = [
    "BatchLoss",
    "Eigenvalues",
    "MeanLoss",
    "Measures",
    "Sharpness",
    "Trace",
    "Vectors",
    "curve",
    "filter_normalized",
    "largest_eigenvalues",
    "measure",
    "plane",
    "trace",
]
