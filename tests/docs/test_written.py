"""Files in docs/ that scripts write are what the scripts write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import yaml

from tests.support.pages import ROOT


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_the_schema() -> None:
    written = script(ROOT / "docs" / "write_configuration.py").reference()
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == written, "the schema has changed: run python docs/write_configuration.py"


def test_the_table_of_recipes_is_that_of_their_files() -> None:
    written = script(ROOT / "docs" / "write_recipes.py").page()
    committed = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == written, "a recipe has changed: run python docs/write_recipes.py"


def test_the_picture_of_the_step_is_what_its_script_draws() -> None:
    drawn = script(ROOT / "docs" / "pictures" / "step.py").picture()
    assert (ROOT / "docs" / "pictures" / "step.svg").read_text(encoding="utf-8") == drawn


def test_the_citation_names_the_version_of_the_package() -> None:
    import ssam_scale

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ssam_scale.__version__
    assert {"title", "authors", "message", "cff-version", "references"} <= citation.keys()
