"""Links lead somewhere, and files that pages name exist."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.support.pages import ROOT, Page, pages

PAGES = pages()
# Files by the kinds that are committed here. Others (`mlflow.db`, `model.safetensors`) are made by runs.
_FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|sh|yaml|md|svg|toml|cff)|/)")
_FOLDERS = (ROOT, ROOT / "ssam_scale")


def test_every_page_is_looked_at() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/concepts.md", "benchmarks/README.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Page) -> None:
    broken = []
    for link in page.links:
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and (target.suffix != ".md" or anchor not in Page(target).anchors)):
            broken.append(link)
    assert not broken, f"{page.name} links to what is not there"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_named_in_backticks_exist(page: Page) -> None:
    named = {literal for literal in page.literals if _FILE.fullmatch(literal)}
    missing = {name for name in named if not any((at / name).exists() for at in (*_FOLDERS, page.path.parent))}
    assert not missing, f"{page.name} names files that are not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_named_in_backticks_can_be_imported(page: Page) -> None:
    for literal in page.literals:
        if re.fullmatch(r"ssam_scale(\.\w+)+", literal):
            module, _, name = literal.rpartition(".")
            try:
                importlib.import_module(literal)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), name), f"{page.name} names {literal}"
