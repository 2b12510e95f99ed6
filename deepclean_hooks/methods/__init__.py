"""The unlearning methods, one a file."""

from deepclean_hooks.methods.baselines.bad_teaching import BadTeaching
from deepclean_hooks.methods.baselines.fine_tune import FineTune
from deepclean_hooks.methods.baselines.fisher_forgetting import FisherForgetting
from deepclean_hooks.methods.baselines.fisher_mask import FisherMask
from deepclean_hooks.methods.baselines.l1_sparse import L1Sparse
from deepclean_hooks.methods.baselines.negative_gradient import NegGradPlus
from deepclean_hooks.methods.baselines.random_label import Amnesiac, RandomLabel
from deepclean_hooks.methods.baselines.retrain import Retrain
from deepclean_hooks.methods.baselines.salun import SalUn
from deepclean_hooks.methods.baselines.scrub import SCRUB
from deepclean_hooks.methods.baselines.small_gradients import MSG
from deepclean_hooks.methods.baselines.transpose import CT
from deepclean_hooks.methods.class_projection import ClassProjection
from deepclean_hooks.methods.deepclean import DeepClean
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.reference_guided import ReferenceGuided
from deepclean_hooks.methods.selecting import Mask, Selection
from deepclean_hooks.methods.ssd import ASSD, LFSSD, SSD
from deepclean_hooks.methods.training import Training

DEFAULT: Method = DeepClean(gamma=2.0)
"""The method where none is named."""

__all__ = [
    "ASSD",
    "CT",
    "DEFAULT",
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
    "ReferenceGuided",
    "Retrain",
    "SalUn",
    "Selection",
    "Training",
]
