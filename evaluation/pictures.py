"""What every picture needs: matplotlib, imported when one is asked for and never before, and a file to write to."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wire.errors import PreconditionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require(path: Path) -> None:
    """Before anything is measured. Raises PreconditionError when the picture could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PreconditionError("--plot needs matplotlib: pip install 'cleave[plots]'") from None
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise PreconditionError(f"{path} must be a .png file in a folder that is there")


def blank(width: float, height: float) -> Any:
    """A figure of so many inches without anything on it, that `save` can write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write it. Raises PreconditionError when that cannot be."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be written: {error.strerror or error}") from error
