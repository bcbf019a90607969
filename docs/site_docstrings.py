"""The package's docstrings as Markdown: a Griffe extension for mkdocstrings.

Only ``Args`` and ``Example`` stay sections; what is raised and returned is prose, in which lines
are wrapped and one item does not begin a line.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).resolve().parent
_PROSE = re.compile(r"(Returns|Raises|Warns|Yields):\s*(.*)")
_ROLE = re.compile(r":(?:func|class|meth|attr|data):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring of this package, as Griffe reads Google's style and MkDocs Markdown."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        prose = _PROSE.fullmatch(line)
        if prose is not None:
            inside = True
            lines += ["", f"**{prose[1]}:** {prose[2]}".rstrip()]
        elif line.strip() and not line.startswith(" "):
            inside = False
            lines.append(re.sub(r"^(Source|Shapes):", r"**\1:**", line))
        else:
            lines.append(line.strip() if inside else line)
    made = "\n".join(lines)
    made = re.sub(r"^Example:$", "Examples:", made, flags=re.MULTILINE)
    made = re.sub(r"^::$", "", made, flags=re.MULTILINE)
    made = re.sub(r"::$", ":", made, flags=re.MULTILINE)
    made = _ROLE.sub(lambda found: reference(found[1]), made)
    return re.sub(r"``([^`]+)``", r"`\1`", made)


def reference(name: str) -> str:
    """A link to the page where ``name`` stands; else its name."""
    short = name.rpartition(".")[2]
    target = on_pages().get(name) or on_pages().get(short)
    return f"`{name}`" if target is None else f"[`{short}`][{target}]"


@cache
def on_pages() -> dict[str, str]:
    """Last part, and all, of each name on the pages of the reference, to the whole name."""
    found: dict[str, str] = {}
    for page in sorted((HERE / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            found.setdefault(name.rpartition(".")[2], name)
            found[name] = name
    return found
