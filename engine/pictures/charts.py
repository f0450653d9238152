"""An empty page for a chart. matplotlib is imported here alone, and only when something is drawn."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(what: str, width: float, height: float) -> "Figure":
    """A figure of so many inches that needs no display.

    Args:
        what: is to be drawn, with its verb, for the error: "the chart needs".

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} the package matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
