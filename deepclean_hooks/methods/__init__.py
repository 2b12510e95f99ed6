"""The unlearning methods, one a file."""

from deepclean_hooks.methods.bad_teaching import BadTeaching
from deepclean_hooks.methods.class_projection import ClassProjection
from deepclean_hooks.methods.deepclean import DeepClean
from deepclean_hooks.methods.fine_tune import FineTune
from deepclean_hooks.methods.fisher_forgetting import FisherForgetting
from deepclean_hooks.methods.fisher_mask import FisherMask
from deepclean_hooks.methods.l1_sparse import L1Sparse
from deepclean_hooks.methods.method import Mask, Method, Selection
from deepclean_hooks.methods.negative_gradient import NegGradPlus
from deepclean_hooks.methods.random_label import Amnesiac, RandomLabel
from deepclean_hooks.methods.retrain import Retrain
from deepclean_hooks.methods.salun import SalUn
from deepclean_hooks.methods.scrub import SCRUB
from deepclean_hooks.methods.small_gradients import MSG
from deepclean_hooks.methods.ssd import ASSD, LFSSD, SSD
from deepclean_hooks.methods.training import Training
from deepclean_hooks.methods.transpose import CT

__all__ = [
    "ASSD",
    "CT",
    "LFSSD",
    "MSG",
    "SCRUB",
    "SSD",
    "Amnesiac",
    "BadTeaching",
    "ClassProjection",
    "DeepClean",
    "FineTune",
    "FisherForgetting",
    "FisherMask",
    "L1Sparse",
    "Mask",
    "Method",
    "NegGradPlus",
    "RandomLabel",
    "Retrain",
    "SalUn",
    "Selection",
    "Training",
]
