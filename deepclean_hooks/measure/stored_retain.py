"""The same samples in the forget and the retain set: refused where it is known, counted where
content tells."""

from __future__ import annotations

from deepclean_hooks import ranks
from deepclean_hooks.data import fingerprints
from deepclean_hooks.measure.measurement import Measurement


def shared_content(forget: Measurement, retain: Measurement) -> int:
    """How many forget samples have a duplicate in the retain set; raises ValueError if all of them
    have."""
    shared = retain.contains(forget)
    if shared == forget.count:
        raise ValueError(
            f"all {shared} forget samples stand in the retain set too; leave them out of it, or "
            "pass the stored diagonal of the whole training set as retain="
        )
    return shared


def without(stored: Measurement, forget: Measurement) -> Measurement:
    """The retain set's diagonal from a stored one: of the retain set as it is, or of the whole
    training set.

    Raises ValueError if only some of the forget samples are in it, so that it is neither, if they
    were taken out by an earlier request, or if they would have to be taken out of a diagonal of
    earlier weights.
    """
    stored.require_same_origin(forget, of_model=not stored.earlier_weights)
    stored = stored.restricted_to(forget.sums)
    _require_sane(stored)
    present = stored.contains(forget)
    _require_known(stored, forget, present)
    already = stored.already_out(forget)
    if already:
        itself = "with of_earlier_weights(without=...)" if stored.earlier_weights else "as it is"
        raise ValueError(
            f"{already} of the {forget.count} forget samples were taken out of the stored "
            f"{stored.noun} before: leave out of this request what is forgotten already; if they "
            f"were only subtracted by hand, pass the {stored.noun} from before that {itself}"
        )
    if present and stored.earlier_weights:
        raise ValueError(
            f"{present} of the {forget.count} forget samples are in the stored {stored.noun} of "
            "earlier weights, and their own is of the weights as they are now, so it cannot be "
            "subtracted; measure them on the earlier weights too: "
            "stored.of_earlier_weights(without=fisher_diagonal(earlier_model, forget))"
        )
    if present == forget.count:
        return stored - forget
    if present:
        raise ValueError(
            f"{present} of the {forget.count} forget samples are in the stored diagonal, so it is "
            "of neither the retain set nor the whole training set; subtract those that are out "
            "already, or measure again"
        )
    return stored


def of_both(stored: Measurement, forget: Measurement) -> Measurement:
    """A stored measurement of the whole training set, for an estimator that is no sum of two walks.

    Raises ValueError unless every forget sample is in it.
    """
    stored.require_same_origin(forget)
    _require_sane(stored)
    present, wanted = stored.contains(forget), len(forget.samples)
    _require_known(stored, forget, present)
    if present < wanted:
        raise ValueError(
            f"{wanted - present} of the {wanted} forget samples are not in the stored "
            f"{stored.noun}, which must be of the whole training set; measure that"
        )
    return stored.restricted_to(forget.sums)


def _require_sane(stored: Measurement) -> None:
    with ranks.fail_together():
        stored.require_sane(f"the stored {stored.noun} is damaged; measure it again")


def _require_known(stored: Measurement, forget: Measurement, present: int) -> None:
    """Raises ValueError where fingerprints do not tell which forget samples are in the stored."""
    kinds = [each.settings.get("fingerprints") for each in (stored, forget)]
    if present < len(forget.samples) and not fingerprints.comparable(*kinds):
        raise ValueError(
            f"the stored {stored.noun} knows its samples by {kinds[0] or fingerprints.ROWS} (as "
            f"earlier versions did), the forget set by {kinds[1] or fingerprints.ROWS}: whether "
            f"the {len(forget.samples)} forget samples are in it cannot be told, {present} of them "
            "match; measure the training set again and save it"
        )
