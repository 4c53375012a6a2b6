"""`import ssam_scale` costs nothing, and its public names are there when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ssam_scale


@pytest.mark.parametrize("name", ssam_scale.__all__)
def test_a_public_name_can_be_imported(name: str) -> None:
    found = getattr(ssam_scale, name)
    assert name == "__version__" or found.__name__ == name
    assert name == "__version__" or found.__doc__


def test_other_names_are_missing_as_anywhere() -> None:
    with pytest.raises(AttributeError, match="'ssam_scale' has no attribute 'SparseSGD'"):
        ssam_scale.SparseSGD  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ssam_scale; from ssam_scale import UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
