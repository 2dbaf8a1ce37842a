"""edgedistill: distil what a black-box model does for one product onto a device."""

__version__ = "0.1.0"
