"""From fovea's results.h5 to xarray data, statistics and a report (docs/analysis.md)."""
from .load import Unreadable, load, load_attention

__all__ = ["Unreadable", "load", "load_attention"]
