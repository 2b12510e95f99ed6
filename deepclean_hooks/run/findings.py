"""What a run tells its user beside the figures: warnings of the report, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.measure.dead import WARN_ABOVE
from deepclean_hooks.measure.request import Measured
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.report.layers import Layer
from deepclean_hooks.stored import bits

# Samples, and per cent: of few samples any may be missed, and of a bad model nothing follows.
_ENOUGH, _GOOD, _NONE = 8, 50.0, 0.1
_REPEATED = 0.01  # of a set: a few duplicates are in many data sets


def of_duplicates(found: Measured) -> str:
    """Forget samples that stand in the retain set too."""
    if not found.shared:
        return ""
    return (
        f"{found.shared} of the {len(found.forget.samples)} forget samples stand in the retain set "
        "with the same content (duplicates in the data): what they taught will not be forgotten"
    )


def of_repeats(found: Measured) -> str:
    """Sets in which samples stand more than once, and weigh as often."""
    told = []
    for name, measurement in {"forget": found.forget, "retain": found.retain}.items():
        count, distinct = len(measurement.samples), len(set(measurement.samples.tolist()))
        if count - distinct > _REPEATED * count:
            told.append(f"{name} holds {count} samples, of which {distinct} are distinct")
    if not told:
        return ""
    return (
        f"{' and '.join(told)}: a sample that is repeated (an index twice in a Subset, a collate "
        "function that doubles) weighs as often in the measurement; show each once"
    )


def of_changing_samples(found: Measured) -> str:
    """Sets that were measured through a random transform."""
    pair = {"forget": found.forget, "retain": found.retain}
    changing = [name for name, one in pair.items() if one.settings.get("samples_change")]
    if not changing:
        return ""
    return (
        f"the samples of {' and '.join(changing)} change from pass to pass (a random transform): "
        "measurement and scores are of the augmented samples of one pass, and another pass gives "
        "others; pass data sets with the test-time transform"
    )


def of_labels(scores: Evaluation | str) -> str:
    """A forget set of which the original model knows nothing, though it knows the retain set."""
    if isinstance(scores, str) or not {"forget", "retain"} <= scores.sets.keys():
        return ""
    forget, retain = scores.sets["forget"], scores.sets["retain"]
    known = retain.accuracy >= _GOOD and forget.accuracy <= _NONE * retain.accuracy
    if not known or forget.count < _ENOUGH:
        return ""
    return (
        f"before anything was changed the model is right on {forget.accuracy:.1f} % of the forget "
        f"set and {retain.accuracy:.1f} % of the retain set: the labels of the forget set may be "
        "mapped otherwise (a folder of its own numbers its classes from 0), or the model was not "
        "trained on it"
    )


def of_ranks(steps: int, parameters: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """Ranks that did not end alike; all ranks call this."""
    own = bits.combined({name: digests[name] for name in parameters if name in digests})
    counted = ranks.gather(steps)
    if len(set(counted)) > 1:
        return (
            f"the ranks made different numbers of optimizer steps: {counted}; they do not train "
            "one model (was the loop run on the model that DistributedDataParallel wraps?)"
        )
    if len(set(ranks.gather(own))) > 1:
        return (
            "the ranks ended with different weights, and this report is of rank 0's; run the loop "
            "on the model that DistributedDataParallel wraps"
        )
    return ""


def of_dead(
    fraction: float, layers: tuple[Layer, ...], parameters: Mapping[str, Tensor], method: Method
) -> str:
    """Reset entries that no training can bring back."""
    if fraction <= WARN_ABOVE:
        return ""
    flat = any(layer.selected and parameters[layer.name].dim() <= 1 for layer in layers)
    knob = f"raise {method.knob}" if method.knob else "select fewer"
    way = f"leave one-dimensional parameters out, or {knob}" if flat else knob
    return (
        f"{fraction:.1%} of the reset entries are dead: their gradient on the retain set is "
        f"exactly 0, so no training brings them back; {way}"
    )
