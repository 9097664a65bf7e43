"""How every plot looks, and SVG as the form in which it is kept."""

import io
from typing import Any

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
}


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg_of(figure: Any, background: str = "none") -> str:
    """The element alone, to stand in a page or, with a background, by itself."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
