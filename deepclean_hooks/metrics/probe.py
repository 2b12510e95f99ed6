"""Does a forgotten class stay linearly decodable from the features before the last layer?

M: samples with features, D: features.
"""

from __future__ import annotations

import torch

from deepclean_hooks.metrics.attack import NO_SKLEARN
from deepclean_hooks.metrics.distance import Measured
from deepclean_hooks.metrics.outputs import MOST_FEATURES, Outputs

MEANING = (
    "linear probe: accuracy in per cent, on unseen samples of the forget set's classes, of a "
    "linear classifier (sklearn.linear_model.RidgeClassifier, balanced, standardised features) "
    f"fitted on the features of at most {MOST_FEATURES} retain and as many forget samples before "
    "the last layer; the aim is the gold model's figure: above it, the class is still held apart"
)


def linear_probe(outputs: dict[str, Outputs], wanted: bool) -> Measured:
    """The probe's accuracy from the features kept of forget, retain and unseen samples."""
    if not wanted:
        return Measured(MEANING, reason="not asked for (pass probe=True)")
    unseen = "forget_test" if "forget_test" in outputs else "test"
    missing = [name for name in ("forget", "retain", unseen) if name not in outputs]
    if missing:
        reason = f"it needs forget, retain, and test or forget_test; missing: {', '.join(missing)}"
        return Measured(MEANING, reason=reason)
    sides = [_features(outputs[name]) for name in ("retain", "forget", unseen)]
    if any(side is None for side in sides):
        reasons = [reason for name in outputs for reason in outputs[name].reasons]
        return Measured(MEANING, reason=reasons[0] if reasons else "no features were kept")
    (retain, retained), (forget, forgotten), (held_out, truth) = (s for s in sides if s is not None)
    among = torch.isin(truth, torch.unique(forgotten))
    classes = torch.unique(torch.cat([retained, forgotten]))
    if not among.any() or len(classes) < 2:
        return Measured(
            MEANING, reason="it needs two classes, and unseen samples of the forget set's classes"
        )
    try:
        from sklearn.linear_model import RidgeClassifier
    except ImportError:
        return Measured(MEANING, reason=NO_SKLEARN)
    known = torch.cat([retain, forget]).double()  # (M, D)
    centre, scale = known.mean(0), known.std(0).clamp_min(1e-12)
    probe = RidgeClassifier(class_weight="balanced")
    probe.fit(((known - centre) / scale).numpy(), torch.cat([retained, forgotten]).numpy())
    called = probe.predict(((held_out[among].double() - centre) / scale).numpy())
    return Measured(MEANING, 100 * float((called == truth[among].numpy()).mean()))


def _features(outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor] | None:
    if outputs.features is None or outputs.positions is None:
        return None
    return outputs.features, outputs.labels[outputs.positions]
