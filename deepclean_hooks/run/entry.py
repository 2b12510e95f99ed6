"""What is checked before a run begins, on all ranks alike."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

from torch import nn

from deepclean_hooks import ranks
from deepclean_hooks.data.changing import changes_from_pass_to_pass
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import (
    Samples,
    require_same_on_ranks,
)
from deepclean_hooks.measure.estimator import name_of
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.methods.method import Method
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.stored import checkpoint

_PLAIN = (bool, int, float, str, bytes, type(None))


def require_shardable(model: nn.Module, method: Method) -> None:
    """Raises ValueError for a sharded model that the method, or what it is measured by, does not
    serve."""
    inner = unwrap(model)
    if not fsdp.is_sharded(inner):
        return
    estimators = (method.measured_by, method.retain_measured_by)
    if not method.sharded or not all(isinstance(e, PerSampleFisher) for e in estimators):
        fsdp.refuse_sharded(inner, f"the method {method.name}")
    if method.is_open:
        fsdp.refuse_sharded(inner, f'{method.knob}="auto"')
    fsdp.require_measurable(inner, ranks.world()[1])


def require_same_samples(sets: Mapping[str, Samples]) -> None:
    """Raises RuntimeError on every rank if a set is not the same one on all of them."""
    if ranks.world()[1] > 1:
        for name, source in sets.items():
            with ranks.fail_together():
                changing = changes_from_pass_to_pass(source)
            require_same_on_ranks(source, name, changing)


def require_unchanged(model: nn.Module, before: Mapping[str, str]) -> None:
    """Raises RuntimeError if a tensor of the model has another digest than when it was measured."""
    now = checkpoint.digests_of(model)
    changed = sorted(n for n in now.keys() | before.keys() if now.get(n) != before.get(n))
    with ranks.fail_together():
        if changed:
            raise RuntimeError(
                f"{len(changed)} tensors of the model changed since it was measured, for instance "
                f"{changed[:3]}, so the selection is of weights that are gone; measure again in a "
                "new Session, and neither train nor load weights until reset() is done"
            )


def identity(loss_fn: LossFn) -> str:
    """What a loss is called and, where that can be seen, a digest of what it does: two functions of
    one name differ."""
    if isinstance(loss_fn, functools.partial):
        given = {k: v for k, v in loss_fn.keywords.items() if isinstance(v, _PLAIN)}
        return f"{identity(loss_fn.func)} with {given}"
    code = getattr(loss_fn, "__code__", None)
    if code is None:
        return name_of(loss_fn)
    cells = [cell.cell_contents for cell in getattr(loss_fn, "__closure__", None) or ()]
    plain = [c for c in (*code.co_consts, *cells) if isinstance(c, _PLAIN)]
    text = repr((code.co_code, code.co_names, plain))
    return f"{name_of(loss_fn)} (code {hashlib.sha256(text.encode()).hexdigest()[:12]})"
