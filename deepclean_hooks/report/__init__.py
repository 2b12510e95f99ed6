"""What a person shows their auditor, as text, JSON, HTML and Markdown."""

from deepclean_hooks.report.layers import Layer
from deepclean_hooks.report.report import Report

__all__ = ["Layer", "Report"]
