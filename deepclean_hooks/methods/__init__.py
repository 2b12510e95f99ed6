"""The unlearning methods, one a file."""

from deepclean_hooks.methods.deepclean import DeepClean
from deepclean_hooks.methods.method import Mask, Method, Selection

__all__ = ["DeepClean", "Mask", "Method", "Selection"]
