"""The pages that people read, taken apart as GitHub shows them: links, anchors, names in backticks, blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SEARCHED = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md", "tests/*.md")
_FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2`*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: what stands behind the fence.
        code: what is in it.
        line: where it begins in the page, from 1.
    """

    language: str
    code: str
    line: int


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def blocks(self) -> list[Block]:
        text = self.text
        return [Block(m[3].strip(), m[4], 2 + text.count("\n", 0, m.start())) for m in _FENCE.finditer(text)]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures that lead to files of this repository."""
        outside = re.sub(r"`[^`]*`", "code", self.prose)
        return [link for link in _LINK.findall(outside) if not re.match(r"[a-z]+:", link)]

    @property
    def anchors(self) -> set[str]:
        """What a link can point to within the page, by GitHub's rule."""
        found: dict[str, int] = {}
        anchors = set()
        for heading in _HEADING.findall(self.prose):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            anchors.add(f"{slug}-{found[slug]}" if slug in found else slug)
            found[slug] = found.get(slug, 0) + 1
        return anchors

    @property
    def literals(self) -> Iterator[str]:
        """What stands in backticks in the prose."""
        return (m[1].replace("\n", " ") for m in re.finditer(r"(?<!`)`([^`]+)`(?!`)", self.prose))


def pages() -> list[Page]:
    """All of them."""
    return [Page(path) for pattern in _SEARCHED for path in sorted(ROOT.glob(pattern))]
