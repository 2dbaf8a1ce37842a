"""report.html: everything measured about one build, in one file that opens without a network."""

from edgedistill.report.html import render_html

__all__ = ["render_html"]
