"""Pictures of explanations: overlays, figures, PNG files, an HTML report.

Needs matplotlib (``pip install 'camkernels[train]'``), and is therefore imported by its name:
``import camkernels`` does not. Figures are made without pyplot: no backend is chosen, no setting of
matplotlib changed, and nothing stays open.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"camkernels.viz needs matplotlib ({error}): pip install 'camkernels[train]'"
    ) from error

from camkernels.viz.boxes import draw_boxes
from camkernels.viz.curves import curve_figure
from camkernels.viz.files import save
from camkernels.viz.grids import grid
from camkernels.viz.overlays import overlay, pictures
from camkernels.viz.report import Report
from camkernels.viz.sheets import before_after_sheet, layer_sheet, map_sheet

__all__ = [
    "Report",
    "before_after_sheet",
    "curve_figure",
    "draw_boxes",
    "grid",
    "layer_sheet",
    "map_sheet",
    "overlay",
    "pictures",
    "save",
]
