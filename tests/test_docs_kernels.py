"""The guide to kernels, carried out: its files in a copy of the repository, built, and tested."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import DOCS, ROOT, Block, blocks_of

from camkernels import backends

COPIED = (
    "camkernels", "csrc", "python", "tests/ops", "tests/cuda_host", "tests/_sitecustomize",
    "tests/conftest.py", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE",
)  # fmt: skip
RUNS = {
    "cpu": {"CAMKERNELS_REQUIRE": "cpu"},
    "triton": {"CAMKERNELS_REQUIRE": "triton", "TRITON_INTERPRET": "1"},
    "cuda": {"CAMKERNELS_REQUIRE": "cuda", "CAMKERNELS_CUDA_HOST": "1"},
}


def files_of_the_guide() -> list[Block]:
    """Blocks that are files, or changes of one."""
    blocks = blocks_of(DOCS / "kernels.md")
    return [b for b in blocks if b.title is not None and "," not in b.title]


def apply(text: str, changes: str) -> str:
    """A diff whose lines are found in order: behind a line that stays new ones are put in; a line
    with a minus may be part of one, and what follows it with a plus takes its place."""
    at, put = 0, ""
    for line in changes.splitlines():
        sign, rest = line[:1], line[1:]
        if sign == " ":
            found = re.compile(rf"^{re.escape(rest)}$", re.MULTILINE).search(text, at)
            assert found is not None, f"the guide's context is not there: {rest}"
            at, put = found.end(), "\n"
        elif sign == "-":
            start = text.find(rest, at)
            assert start >= 0, f"the guide's line is not there: {rest}"
            text, at, put = text[:start] + text[start + len(rest) :], start, ""
        else:
            text = text[:at] + put + rest + text[at:]
            at += len(put) + len(rest)
    return text


def test_changes_of_the_guide_fit() -> None:
    titles = [block.title for block in files_of_the_guide()]
    assert len(titles) == len(set(titles))
    for block in files_of_the_guide():
        assert block.title is not None
        path = ROOT / block.title
        assert path.exists() == (block.language == "diff"), block.title
        if block.language == "diff":
            changed = apply(path.read_text(), block.text)
            for line in block.text.splitlines():
                assert not line.startswith("+") or line[1:] in changed


def run(
    root: Path, command: list[str], good: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = f"{root}{os.pathsep}{root / 'tests/_sitecustomize'}"
    found = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = found.stdout + found.stderr
    assert not good or found.returncode == 0, output[-6000:]
    return found


def carried_out(root: Path) -> None:
    """The repository with the guide's op in it, its C++ built."""
    for name in COPIED:
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy2(source, target)
    for block in files_of_the_guide():
        assert block.title is not None
        path = root / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "diff":
            path.write_text(apply(path.read_text(), block.text))
        else:
            path.write_text(block.text)
    (root / "camkernels/ops/foo/__init__.py").touch()
    run(root, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        CAMKERNELS_CPU="1", CAMKERNELS_CUDA="0")  # fmt: skip
    where = run(root, [sys.executable, "-c", "import camkernels; print(camkernels.__file__)"])
    assert where.stdout.startswith(str(root)), where.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None,
    reason="no C++ compiler made this installation, so none makes the copy",
)
def test_the_guides_op(tmp_path: Path) -> None:
    """On every backend, and red where its kernel is broken."""
    carried_out(tmp_path)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_foo.py",
    ]
    triton = importlib.util.find_spec("triton") is not None
    for backend, environment in RUNS.items():
        if backend == "triton" and not triton:
            continue
        assert f"[{backend}]" in run(tmp_path, [*tests, "--collect-only"], **environment).stdout
        found = run(tmp_path, tests, **environment)
        assert re.search(r"\d+ passed", found.stdout), found.stdout
    path = tmp_path / "camkernels/ops/foo/triton.py"
    whole = path.read_text()
    for right, wrong in (("(twice * m)", "(m)"), ("mask=p < P)", "mask=p < P - 1)")):
        assert right in whole
        path.write_text(whole.replace(right, wrong))
        if triton:
            # of these, since Hypothesis would look for the smallest failing example for minutes
            few = [*tests, "-x", "-k", "known_values or every_output"]
            broken = run(tmp_path, few, good=False, **RUNS["triton"])
            assert broken.returncode == 1, wrong
