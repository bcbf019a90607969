"""PNG files and the HTML report: what is in them, and what is left where they cannot be written."""

from __future__ import annotations

import base64
import errno
import io
import math
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from camkernels import viz

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Elements and texts of a page; fails where elements are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.doctype = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_decl(self, decl: str) -> None:
        self.doctype = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def images(self) -> list[np.ndarray]:
        found = []
        for attributes in self.all("img"):
            kind, data = str(attributes["src"]).split(",", 1)
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            found.append(np.array(picture))
        return found


def picture(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def small_figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    colour, grey = picture(5, 7, 3), picture(6, 4)
    viz.save(colour, tmp_path / "new" / "folder" / "colour.png")
    viz.save(grey.numpy(), str(tmp_path / "grey.PNG"))
    viz.save(colour.permute(1, 0, 2), tmp_path / "turned.png")
    for name, expected in (
        ("new/folder/colour.png", colour),
        ("grey.PNG", grey),
        ("turned.png", colour.transpose(0, 1)),
    ):
        assert np.array_equal(np.array(Image.open(tmp_path / name)), expected.numpy())
    assert sorted(os.listdir(tmp_path)) == ["grey.PNG", "new", "turned.png"]


def test_figures_have_the_pixels_asked_for(tmp_path: Path) -> None:
    viz.save(small_figure(), tmp_path / "a.png", dpi=80)
    assert Image.open(tmp_path / "a.png").size == (160, 80)
    viz.save(small_figure(), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (300, 150)


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        (picture(5, 5, 3), "a.jpg", r"path: expected a name that ends in \.png, got '.*a\.jpg'"),
        (picture(5, 5, 3), "", "path: expected a name that ends in .png, got ''"),
        (picture(5, 5, 4), "a.png", r"picture: expected \(H, W, 3\) or \(H, W\), got \(5, 5, 4\)"),
        (picture(0, 5, 3), "a.png", r"picture: .* got \(0, 5, 3\)"),
        (torch.rand(5, 5, 3), "a.png", "picture: expected uint8, got torch.float32"),
        ([1], "a.png", "picture: expected a matplotlib Figure, .* got list"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, given: Any, path: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        viz.save(given, tmp_path / path if path else path)
    with pytest.raises(ValueError, match="dpi: expected a positive number, got 0"):
        viz.save(small_figure(), tmp_path / "a.png", dpi=0)
    assert list(tmp_path.iterdir()) == []


Writer = Callable[[Path], None]


def save(path: Path) -> None:
    viz.save(picture(5, 5, 3), path.with_suffix(".png"))


def report(path: Path) -> None:
    viz.Report("Title").write(path.with_suffix(".html"))


@pytest.mark.parametrize("write", [save, report])
def test_a_folder_that_cannot_be_written_to_is_named(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        OSError, match=r"cannot write .*file/a\.(png|html): .*; nothing was written"
    ):
        write(tmp_path / "file" / "a")
    folder = tmp_path / "taken.png"
    folder.mkdir()
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(IsADirectoryError, match=r"cannot write .*; nothing was written"):
        write(tmp_path / "taken")
    assert sorted(os.listdir(tmp_path)) == ["file", "taken.html", "taken.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"cannot write .*a\.png: Permission denied"):
        save(tmp_path / "a")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("write", [save, report])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    write: Writer, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def full(*_: Any) -> None:
        seen.extend(os.listdir(tmp_path))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left on device; nothing was written") as caught:
            write(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert [name[:3] for name in seen] == [".a."]  # the file beside it was there
    assert os.listdir(tmp_path) == []
    write(tmp_path / "a")
    (written,) = tmp_path.iterdir()
    before = written.read_bytes()
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="the older file is intact"):
        write(tmp_path / "a")
    assert written.read_bytes() == before
    assert len(os.listdir(tmp_path)) == 1


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_report_holds_all_that_was_added_in_order() -> None:
    page = viz.Report("Maps", {"layer": "layer4", "seed": 0, "alpha": 0.1 + 0.2})
    page.add_heading("Scores")
    page.add_text("One line.\nAnother.")
    page.add_table([{"method": "CAM", "drop": 1.5}], "All")
    page.add_figure(small_figure(), "A line", dpi=50)
    pictures = picture(2, 5, 7, 3)
    page.add_images(pictures, ["cat", "dog"])
    found = Page(page.html())
    assert found.doctype == "DOCTYPE html"
    assert found.all("html") == [{"lang": "en"}]
    assert found.all("meta")[0] == {"charset": "utf-8"}
    assert found.said("title") == found.said("h1") == ["Maps"]
    assert found.said("caption") == ["Parameters", "All"]
    assert found.said("th") == ["layer", "seed", "alpha", "method", "drop"]
    assert found.said("td") == ["layer4", "0", "0.3", "CAM", "1.500"]
    assert found.said("h2") == ["Scores"]
    assert found.said("p") == ["One line.\nAnother."]
    assert found.said("figcaption") == ["A line", "cat", "dog"]
    assert [image["alt"] for image in found.all("img")] == ["A line", "cat", "dog"]
    line, *sheet = found.images()
    assert line.shape == (50, 100, 4)
    assert np.array_equal(np.stack(sheet), pictures.numpy())
    order = [name for name, _ in found.elements if name in ("h1", "h2", "table", "img")]
    assert order == ["h1", "table", "h2", "table", "img", "img", "img"]


def test_a_report_loads_nothing_and_runs_nothing() -> None:
    page = viz.Report("Maps")
    page.add_images(picture(2, 5, 7, 3), ["cat", "dog"])
    found = Page(page.html())
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in found.elements}
    (style,) = found.said("style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "color-scheme: light dark" in style
    policy = found.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:")
    assert not [a for _, attributes in found.elements for a in attributes if a.startswith("on")]


EVIL = "</td><script>alert('1')</script> & \"quotes\" \x00\x1b\udcff \N{SNOWMAN}"
TAME = "</td><script>alert('1')</script> & \"quotes\" \ufffd\ufffd? \N{SNOWMAN}"


def test_text_of_users_is_text() -> None:
    page = viz.Report(EVIL, {EVIL: EVIL})
    page.add_heading(EVIL)
    page.add_text(EVIL)
    page.add_table([{EVIL: EVIL}], EVIL)
    page.add_figure(picture(3, 3, 3), EVIL, alt=EVIL)
    page.add_images([picture(3, 4)], [EVIL])
    found = Page(page.html())
    assert not found.all("script")
    tags = ("title", "h1", "h2", "p", "th", "td", "caption", "figcaption")
    for tag in tags:
        assert set(found.said(tag)) <= {TAME, "Parameters"}, tag
        assert TAME in found.said(tag), tag
    assert [image["alt"] for image in found.all("img")] == [TAME, TAME]
    page.html().encode("utf-8")


def table_of(*values: Any) -> tuple[list[str], bool]:
    """Texts of a column and whether it is aligned right."""
    page = viz.Report("Maps")
    page.add_table([{"row": "x", "column": value} for value in values])
    html = (
        page.html().replace("<td></td>", "<td>-</td>").replace('"number"></td>', '"number">-</td>')
    )
    found = Page(html)
    kinds = {str(cell.get("class")) for cell in found.all("td")[1::2] + found.all("th")[1:]}
    (kind,) = kinds
    return found.said("td")[1::2], kind == "number"


@pytest.mark.parametrize(
    ("values", "texts", "right"),
    [
        ((1, 20), ["1", "20"], True),
        ((0.5, 0.25, 0), ["0.5000", "0.2500", "0.0000"], True),
        ((12.3456, 3.1), ["12.35", "3.10"], True),
        ((12345.6, 30.0), ["12346", "30"], True),
        ((1e-6, 1.0), ["1e-06", "1"], True),
        ((2e9, 0.5), ["2e+09", "0.5"], True),
        ((math.nan, 0.5, math.inf), ["NaN", "0.5000", "inf"], True),
        ((None, 2.5), ["-", "2.500"], True),
        ((None, None), ["-", "-"], False),
        ((True, False), ["yes", "no"], False),
        (("a", 0.123456), ["a", "0.1235"], False),
        ((torch.tensor(0.5), np.float32(0.25), torch.ones(1)), ["0.500", "0.250", "1.000"], True),
        ((torch.tensor(3), np.int64(4)), ["3", "4"], True),
        ((np.bool_(True), torch.tensor(False)), ["yes", "no"], False),
    ],
)  # fmt: skip
def test_numbers_are_aligned_and_have_the_same_decimals(
    values: Any, texts: list[str], right: bool
) -> None:
    assert table_of(*values) == (texts, right)


def test_rows_without_a_column_and_tables_without_rows() -> None:
    page = viz.Report("Maps")
    page.add_table([{"a": 1}, {"b": "x", "a": 2}])
    page.add_table([], "Scores")
    found = Page(page.html())
    assert found.said("th") == ["a", "b"]
    assert len(found.all("td")) == 4
    assert found.said("td") == ["1", "2", "x"]
    assert found.said("p") == ["Scores: no rows"]
    assert not found.said("caption")


def test_a_report_is_written_and_the_same_each_time(tmp_path: Path) -> None:
    def made() -> viz.Report:
        torch.manual_seed(1)
        page = viz.Report("Maps \N{SNOWMAN}", {"seed": 1})
        page.add_images(picture(1, 5, 7, 3), ["cat"])
        page.add_figure(small_figure(), "", alt="a line")
        return page

    page = made()
    page.write(tmp_path / "sub" / "a.html")
    text = (tmp_path / "sub" / "a.html").read_text(encoding="utf-8")
    assert text == page.html() == made().html()
    assert Page(text).said("figcaption") == ["cat"]
    assert os.listdir(tmp_path / "sub") == ["a.html"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda page: page.write("a.txt"), "path: expected a name that ends in .html or .htm"),
        (lambda page: page.add_images(picture(2, 5, 5, 3), ["a"]), "captions: expected 2, .* 1"),
        (lambda page: page.add_images(picture(1, 5, 5, 3), [" "]), "caption, alt: expected a text"),
        (lambda page: page.add_figure(small_figure(), ""), "caption, alt: expected a text"),
        (lambda page: page.add_figure("x", "x"), "picture: expected a matplotlib Figure"),
        (lambda page: viz.Report("  "), "title: expected a text, got none"),
    ],
)  # fmt: skip
def test_bad_sections_are_named(call: Callable[[viz.Report], None], message: str) -> None:
    page = viz.Report("Maps")
    before = page.html()
    with pytest.raises((ValueError, TypeError), match=message):
        call(page)
    assert page.html() == before
