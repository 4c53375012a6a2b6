"""How much of each layer was perturbed, over a run: a table that a resumed run continues."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Mapping

# Beyond this many columns every second one is dropped, and from then on only every second (fourth, …) is added.
_COLUMNS = 1000


class LayerDensities:
    """The share of each parameter's weights that is perturbed, one column for each record.

    Attributes:
        sizes: weights of each parameter over all processes, by name, in the network's order.
        steps: the step of each column, rising.
        columns: densities in [0, 1], parallel to `sizes`.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.steps: list[int] = []
        self.columns: list[array[float]] = []
        self._stride, self._passed = 1, 0

    def add(self, counts: Mapping[str, float], sizes: Mapping[str, int], step: int) -> bool:
        """Add a column in the place of those of this step and later ones, which a resumed run makes again.

        Args:
            counts: perturbed weights of each parameter that has any, over all processes.
            sizes: all weights of each parameter.
            step: of the record.

        Returns:
            Whether there is a new column: where there were very many records, only some are kept.
        """
        if dict(sizes) != self.sizes:
            self.sizes, self.steps, self.columns = dict(sizes), [], []
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.columns.pop()
        self._passed += 1
        if self.steps and self._passed < self._stride:
            return False
        self._passed = 0
        self.steps.append(step)
        self.columns.append(array("f", [counts.get(name, 0) / max(size, 1) for name, size in sizes.items()]))
        if len(self.steps) > _COLUMNS:
            self.steps, self.columns = self.steps[::2], self.columns[::2]
            self._stride *= 2
        return True

    def copy(self) -> LayerDensities:
        """What is there now; later additions do not show in it."""
        result = LayerDensities()
        result.sizes, result.steps, result.columns = self.sizes, self.steps.copy(), self.columns.copy()
        return result

    def table(self) -> str:
        """CSV: a row for each parameter, with its name, its weights, and its density in a column for each step."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["parameter", "weights", *self.steps])
        for row, (name, size) in enumerate(self.sizes.items()):
            writer.writerow([name, size, *(f"{column[row]:.4g}" for column in self.columns)])
        return out.getvalue()

    @classmethod
    def from_table(cls, text: str) -> LayerDensities:
        """Read what `table` wrote.

        Raises:
            ValueError: it is no such table.
        """
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
        if header[:2] != ["parameter", "weights"] or any(len(row) != len(header) for row in rows):
            raise ValueError("no table of layer densities")
        result = cls()
        result.sizes = {row[0]: int(row[1]) for row in rows}
        result.steps = [int(step) for step in header[2:]]
        result.columns = [array("f", [float(row[2 + i]) for row in rows]) for i in range(len(result.steps))]
        return result
