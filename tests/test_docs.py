"""The pages of docs/: their code runs, their commands parse, their links and names are there."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from camtrain import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Pages that MkDocs takes from the repository's root, see docs/site_hooks.py.
LINKED = [*PAGES, ROOT / "README.md"]
SHELLS = ("shell", "bash", "sh", "console")
NOT_RUN = "<!-- not run"
"""Above a block of Python that no test can run."""


class Block(NamedTuple):
    """A fenced block: its language, its title (a file's path) and its text."""

    language: str
    title: str | None
    text: str
    line: int
    run: bool


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        title = re.search(r'title="([^"]+)"', found[2])
        before = text[: found.start()].rstrip().rpartition("\n")[2]
        line = text.count("\n", 0, found.start()) + 2
        run = not before.startswith(NOT_RUN)
        yield Block(found[1], None if title is None else title[1], found[3], line, run)


# ---- code ----


def runnable(page: Path) -> list[Block]:
    """Blocks of Python that are no files of the repository."""
    blocks = blocks_of(page)
    return [b for b in blocks if b.language == "python" and b.title is None and b.run]


def test_what_is_taken_for_a_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'a\n\n```python\nx = 1\n\ny = 2\n```\n\n```python title="a/b.py"\nno\n```\n\n```text\n'
        "no\n```\n\n<!-- not run: a GPU -->\n\n```python\nno\n```\n"
    )
    (block,) = runnable(page)
    assert block.text == "x = 1\n\ny = 2\n"
    assert block.line == 4
    assert [b.title for b in blocks_of(page)] == [None, "a/b.py", None, None]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, in order and in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in runnable(page):
        # so that an error names the line of the page
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page), "exec"), namespace)


# ---- commands ----


def commands(page: Path) -> list[str]:
    """Commands of the training program."""
    shells = [b.text for b in blocks_of(page) if b.language in SHELLS]
    lines = "\n".join(shells).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("camtrain ")]


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    "command", [c for _, c in ALL_COMMANDS], ids=[f"{p.name}-{c[9:40]}" for p, c in ALL_COMMANDS]
)
def test_commands_parse(command: str) -> None:
    """Flags exist, and those of ``fit`` go together."""
    arguments = cli.parser().parse_args(shlex.split(command, comments=True)[1:])
    if arguments.command == "fit" and not arguments.resume and arguments.config is None:
        cli.fit_config(arguments)


def test_flags_in_the_text_exist() -> None:
    known = {
        option
        for words in (["fit"], ["plan"], ["study"], ["explain"], ["evaluate"], ["demo"])
        for option in _options(words)
    }
    for name in ("quick-start.md", "choosing-weights.md", "memory.md"):
        text = (DOCS / name).read_text()
        named = set(re.findall(r"`(--[a-z][a-z-]*)", text))
        assert named <= known, f"{name}: no command has {sorted(named - known)}"


def _options(words: list[str]) -> list[str]:
    actions = cli.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, index]
    found = actions[words[0]]._option_string_actions  # type: ignore[index]
    return list(found)


# ---- links ----


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's toc and GitHub make it of plain words."""
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*_]", "", heading)).strip().lower()
    return re.sub(r"[\s]+", "-", text)


def links_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", LINKED, ids=[*NAMES, "README.md"])
def test_links_resolve(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{link}: no such heading"


def test_references_to_names_resolve() -> None:
    """``[text][camkernels.name]`` is a link to the page where the name stands."""
    listed = {name for names in reference().values() for name in names}
    for page in PAGES:
        named = set(re.findall(r"\]\[(camkernels[\w.]*)\]", page.read_text()))
        assert named <= listed, f"{page.name}: {sorted(named - listed)}"


# ---- the reference ----


def reference() -> dict[str, list[str]]:
    """Names on each page of the reference."""
    return {
        page.name: re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
        for page in sorted((DOCS / "api").glob("*.md"))
    }


def public_names() -> list[str]:
    """All that the package gives; what two modules give, by the shorter name."""
    found: dict[int, str] = {}
    for name in ("camkernels", "camkernels.metrics", "camkernels.viz", "camkernels.nn"):
        module = importlib.import_module(name)
        for short in module.__all__:
            value = getattr(module, short)
            if not inspect.ismodule(value):
                found.setdefault(id(value), f"{name}.{short}")
    functional = importlib.import_module("camkernels.nn.functional")
    own = [
        f"{functional.__name__}.{name}"
        for name, value in vars(functional).items()
        if inspect.isfunction(value)
        and value.__module__ == functional.__name__
        and not name.startswith("_")
    ]
    return [*found.values(), *own]


def value_of(name: str) -> Any:
    """A name of the reference, which may be a module."""
    module, _, attribute = name.rpartition(".")
    parent = importlib.import_module(module)
    return (
        getattr(parent, attribute) if hasattr(parent, attribute) else importlib.import_module(name)
    )


def test_every_public_name_stands_on_one_page() -> None:
    listed = [name for names in reference().values() for name in names]
    assert len(listed) == len(set(listed)), "a name stands twice"
    missing = set(public_names()) - set(listed)
    assert not missing, f"on no page of docs/api: {sorted(missing)}"
    for name in listed:
        value_of(name)


def test_every_public_name_has_a_docstring() -> None:
    wrong = []
    for name in public_names():
        summary = (value_of(name).__doc__ or "").strip().partition("\n\n")[0]
        # may begin with its formula
        if len(summary.split()) < 3 or summary[-1] not in ".:":
            wrong.append(f"{name}: {summary!r}")
    assert not wrong, "no sentence to begin with: " + "\n".join(wrong)


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml", reason="the training program's extras are not installed")
    text = (ROOT / "mkdocs.yml").read_text()

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from pages(value)
        else:
            for value in entry:
                yield from pages(value)

    shown = set(pages(yaml.safe_load(text)["nav"]))
    here = {str(page.relative_to(DOCS)) for page in PAGES}
    assert here <= shown, f"mkdocs.yml: nav lacks {sorted(here - shown)}"
    assert all((DOCS / p).exists() or (ROOT / p).exists() for p in shown)


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed (make docs brings it)")
    sys.path.insert(0, str(DOCS))
    try:
        made = importlib.import_module("site_docstrings").as_markdown
    finally:
        sys.path.remove(str(DOCS))
    text = (
        "A sentence, see :func:`swap_in` and ``x``::\n\n    y = f(x)\n\nArgs:\n    x: a tensor.\n\n"
        "Raises:\n    ValueError: an\n    unknown word. TypeError: none.\n\nSource: a paper.\n\n"
        "Example:\n    >>> 1\n"
    )
    assert made(text) == (
        "A sentence, see [`swap_in`][camkernels.swap_in] and `x`:\n\n    y = f(x)\n\n"
        "Args:\n    x: a tensor.\n\n\n**Raises:**\nValueError: an\nunknown word. "
        "TypeError: none.\n\n"
        "**Source:** a paper.\n\nExamples:\n    >>> 1"
    )
