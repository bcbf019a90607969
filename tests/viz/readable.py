"""Whether the text of a figure can be read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def ticks_out_of_view(figure: Figure) -> Iterator[Text]:
    """Labels that matplotlib keeps but does not draw."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    yield tick.label1


def assert_readable(figure: Figure) -> None:
    """All text inside of the figure, large enough, none over another or over a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unseen = set(ticks_out_of_view(figure))
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    texts = [t for t in texts if t not in unseen]
    places = [t.get_window_extent(renderer) for t in texts]
    for text, place in zip(texts, places, strict=True):
        assert text.get_fontsize() >= 8, text
        assert place.x0 >= 0, text
        assert place.y0 >= 0, text
        assert place.x1 <= figure.bbox.x1, text
        assert place.y1 <= figure.bbox.y1, text
    for (one, here), (other, there) in combinations(zip(texts, places, strict=True), 2):
        assert not here.overlaps(there), (one, other)
    pictures = [axis.get_window_extent(renderer) for axis in figure.axes if axis.images]
    for text, place in zip(texts, places, strict=True):
        assert not any(place.overlaps(picture) for picture in pictures), text
