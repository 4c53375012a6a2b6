"""`ssam-scale compare`: runs of an experiment beside each other, as a table and as a page.

In reading order: `runs` reads them from MLflow, `alike` refuses what cannot be compared, `groups` pools seeds and finds
what a method is measured against, `statistics` computes, `rows` puts that together, `columns` says how each number is
shown and was measured; `page` and `figures` make the report, `files` and `record` store it.
"""

from __future__ import annotations

from .alike import ASPECTS
from .columns import Column, columns
from .rows import Comparison, Question, Row, compare, compared
from .runs import Experiment, find_experiment

__all__ = [
    "ASPECTS",
    "Column",
    "Comparison",
    "Experiment",
    "Question",
    "Row",
    "columns",
    "compare",
    "compared",
    "find_experiment",
]
