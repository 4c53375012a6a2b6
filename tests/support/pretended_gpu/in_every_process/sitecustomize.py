"""Every Python that finds this folder in PYTHONPATH (and the checkout) pretends to have a GPU, children included."""

from tests.support.pretended_gpu.__main__ import pretend

pretend(1)
