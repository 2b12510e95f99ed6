"""The settings of published experiments by name: a method, and how its authors train.

setting = PUBLISHED["scrub"]
unlearn(model, forget, retain, method=setting.method, **setting.training)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from torch.optim import SGD, Adam

from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.measure.layer_inputs import LayerInputs, SampledPatches
from deepclean_hooks.methods.baselines.bad_teaching import BadTeaching
from deepclean_hooks.methods.baselines.fine_tune import FineTune
from deepclean_hooks.methods.baselines.fisher_forgetting import FisherForgetting
from deepclean_hooks.methods.baselines.fisher_mask import FisherMask
from deepclean_hooks.methods.baselines.l1_sparse import L1Sparse
from deepclean_hooks.methods.baselines.random_label import Amnesiac, RandomLabel
from deepclean_hooks.methods.baselines.retrain import Retrain
from deepclean_hooks.methods.baselines.salun import SalUn
from deepclean_hooks.methods.baselines.scrub import SCRUB
from deepclean_hooks.methods.baselines.small_gradients import MSG
from deepclean_hooks.methods.baselines.transpose import CT
from deepclean_hooks.methods.class_projection import ClassProjection
from deepclean_hooks.methods.deepclean import DeepClean
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.ssd import LFSSD, SSD


@dataclass(frozen=True)
class Setting:
    """A method as it was published, and the keyword arguments of `unlearn` that go with it.

    `source` says where the numbers stand; `differs`, what `unlearn` does otherwise than the source,
    beside the learning rate, which it lowers to 0 along a cosine.
    """

    method: Method
    source: str
    training: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""


def _sgd(epochs: int, batch_size: int | None, lr: float, decay: float = 5e-4) -> dict[str, Any]:
    optimizer = partial(SGD, lr=lr, momentum=0.9, weight_decay=decay)
    size = {} if batch_size is None else {"batch_size": batch_size}
    return {"epochs": epochs, "optimizer": optimizer, **size}


def _adam(epochs: int, batch_size: int, lr: float) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": batch_size, "optimizer": partial(Adam, lr=lr)}


_PAPER = "DeepClean, section of the experiments"
_TABLES = "DeepClean, tables 1 to 3"
_SALUN = "code of SalUn (OPTML-Group/Unlearn-Saliency)"
_STEPS = "their rate stays as it is: its steps, at epochs 91 and 136, are never reached"
_CHALLENGE = "code of Deep Unlearn (arXiv 2410.01276)"
# Batch size: nowhere in the DeepClean paper; `unlearn` takes the loader's own, or 64.
_RECIPE = {"epochs": 3, "lr": 1e-3}

PUBLISHED: Mapping[str, Setting] = MappingProxyType(
    {
        "deepclean/class": Setting(DeepClean(gamma=2.0), _PAPER, _RECIPE),
        "deepclean/random": Setting(DeepClean(gamma=1.1), _PAPER, _RECIPE),
        "deepclean/class, mnist": Setting(DeepClean(gamma=2.0), _PAPER, {"epochs": 1, "lr": 1e-3}),
        "deepclean/random, mnist": Setting(DeepClean(gamma=1.1), _PAPER, {"epochs": 1, "lr": 1e-3}),
        "fine-tune/deepclean": Setting(FineTune(), _TABLES, _RECIPE),
        "bad teaching/deepclean": Setting(
            BadTeaching(as_published=True), _TABLES, {"epochs": 10, "lr": 1e-3}
        ),
        "bad teaching/deepclean, mnist": Setting(
            BadTeaching(as_published=True), _TABLES, {"epochs": 5, "lr": 1e-3}
        ),
        "bad teaching": Setting(
            BadTeaching(as_published=True),
            "notebook of vikram2000b/bad-teaching-unlearning",
            _adam(1, 256, 1e-4),
            "their divergence is divided by the number of classes too",
        ),
        "retrain": Setting(
            Retrain(),
            "README of OPTML-Group/Unlearn-Sparse",
            _sgd(160, 256, 0.1),
            "their rate is divided by 10 at epochs 91 and 136; they augment",
        ),
        "fine-tune/ssd": Setting(
            FineTune(), "code of SSD (if-loops/selective-synaptic-dampening)", _sgd(5, 64, 0.02)
        ),
        "fine-tune/salun": Setting(FineTune(), _SALUN, _sgd(10, 256, 0.01), _STEPS),
        "l1-sparse": Setting(
            L1Sparse(),
            "code of OPTML-Group/Unlearn-Sparse; the weight of the penalty is not in it",
            _sgd(10, 256, 0.01),
            _STEPS,
        ),
        "random label": Setting(
            RandomLabel(as_published=True), _SALUN, _sgd(10, 256, 0.013), _STEPS
        ),
        "salun": Setting(SalUn(share=0.5, as_published=True), _SALUN, _sgd(10, 256, 0.013), _STEPS),
        "amnesiac/ssd": Setting(
            Amnesiac(as_published=True),
            "code of SSD, lmgraves/AmnesiacML's relabelling",
            _adam(3, 128, 1e-4),
        ),
        "amnesiac/bad teaching": Setting(
            Amnesiac(as_published=True),
            "code of vikram2000b/bad-teaching-unlearning",
            _adam(3, 256, 1e-4),
        ),
        "ssd": Setting(
            SSD(alpha=10.0, dampening=1.0, estimator=BatchMean(batch_size=64, seed=0)),
            "code of SSD, ResNet-18",
            differs="they walk the retain set and then the forget set; the seed shuffles",
        ),
        "ssd/vit, class": Setting(
            SSD(alpha=5.0, estimator=BatchMean(batch_size=64, seed=0)), "code of SSD, ViT"
        ),
        "ssd/vit, subclass": Setting(
            SSD(alpha=25.0, estimator=BatchMean(batch_size=64, seed=0)), "code of SSD, ViT"
        ),
        "ssd/faces": Setting(
            SSD(alpha=50.0, dampening=0.1, estimator=BatchMean(batch_size=64, seed=0)),
            "code of SSD, Pins face recognition",
        ),
        "lfssd": Setting(LFSSD(), "code of loss-free SSD"),
        "class projection/cifar10": Setting(
            ClassProjection(100.0, 3.0, LayerInputs(patches=SampledPatches(10_000))),
            "code of sangamesh-kodge/class_forgetting",
            differs="pass Subsets of 900 samples; they were drawn with augmentation",
        ),
        "class projection/cifar100": Setting(
            ClassProjection(1000.0, 30.0, LayerInputs(patches=SampledPatches(10_000))),
            "code of sangamesh-kodge/class_forgetting",
            differs="pass Subsets of 990 samples; they were drawn with augmentation",
        ),
        "class projection/imagenet": Setting(
            ClassProjection(100.0, 10.0, LayerInputs(patches=SampledPatches(10_000))),
            "code of sangamesh-kodge/class_forgetting",
            differs="pass Subsets of 999 samples; they were drawn with augmentation",
        ),
        "fisher forgetting/cifar10": Setting(
            FisherForgetting(classes=10, alpha=1e-6),
            "notebook of AdityaGolatkar/SelectiveForgetting",
            differs="alpha was swept from 1e-8 to 1e-5; tune it",
        ),
        "fisher mask/cifar10": Setting(
            FisherMask(classes=10, share=0.02),
            "code of Yufang-Liu/fisher_unlearning",
            _sgd(5, 128, 0.1, 1e-4),
            "they square means of batches of 128, and train up to 30 epochs with the schedule of 5",
        ),
        "msg": Setting(
            MSG(share=0.3, slow=0.1),
            _CHALLENGE,
            _sgd(5, 64, 1e-3),
            "their rate rises over half of the epochs and falls linearly after; their gradient is "
            "of as many retain as forget samples",
        ),
        "ct": Setting(CT(), _CHALLENGE, _sgd(3, None, 1e-3)),
        "scrub": Setting(
            SCRUB(alpha=0.001, gamma=0.99, temperature=4.0, forget_epochs=2),
            "code of SCRUB",
            _sgd(10, None, 5e-4),
            "their rate is divided by 10 after epochs 3, 5 and 9; momentum is ours",
        ),
    }
)
"""By name; "/" parts a method from whose setting it is or what it is for."""
