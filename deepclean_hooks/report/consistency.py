"""What a report says in two places must be the same in both."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from deepclean_hooks.report import stored_report
from deepclean_hooks.report.check import Check, equal, none_of
from deepclean_hooks.report.stored_report import Document
from deepclean_hooks.stored import bits
from deepclean_hooks.stored.naming import plain

# The share of W_f that may hold its old value in the end, and in half precision, where an entry
# comes back to its bits by chance once in some hundreds, a few more.
RETURNED = 0.05
RETURNED_HALF = 8


def own_digest(report: Document) -> Check:
    """That the digest in the report is that of its fields."""
    what = "digest of the report"
    if report["schema"] == 2:
        return Check(what, None, "a report of schema 2 has none")
    right = report["digest"] == stored_report.digest(report)
    return Check(what, right, f"{'' if right else 'not '}that of its fields")


def consistent(report: Document) -> Iterator[Check]:
    """What a report says in two places must be the same in both."""
    layers = report["layers"]
    selected, entries, may_change = (
        sum(layer[key] for layer in layers) for key in ("selected", "entries", "may_change")
    )
    yield equal("selected entries, layer by layer", selected, report["selected_entries"])
    yield equal("trainable entries, layer by layer", entries, report["trainable_entries"])
    yield equal("entries that may change, layer by layer", may_change, report["may_change_entries"])
    wrong = [
        layer["name"]
        for layer in layers
        if not 0 <= layer["selected"] <= layer["may_change"] <= layer["entries"]
    ]
    yield none_of("selected entries are among those that may change", wrong, "in every layer")
    yield _names(report)
    fraction = report["selected_fraction"]
    if fraction is not None and entries:
        right = math.isclose(fraction, selected / entries)
        yield Check("selected fraction", right, f"{fraction:.6f}")
    yield equal("frozen entries that moved", 0, report["frozen_entries_moved"])
    restored = report.get("restored_entries")
    if restored is not None:
        few = restored <= RETURNED_HALF and 2 * restored <= selected
        right = few or restored <= RETURNED * selected
        words = f"{restored} of {selected} hold their original value by the count in the report"
        yield Check("W_f did not come back", right, words)
    yield _hashes(report)
    after = report["scores"].get("after")
    if isinstance(after, Mapping) and after["gaps"]:
        yield _gaps(after)


def _names(report: Document) -> Check:
    """Each layer is a parameter of the model, and tied tensors have the same content."""
    names = [layer["name"] for layer in report["layers"]]
    wrong = [name for name, count in Counter(names).items() if count > 1]
    both = report["checkpoint_before"], report["checkpoint_after"]
    for digests in filter(None, both):
        known = {plain(name) for name in digests}
        wrong += [name for name in names if plain(name) not in known]
        tied = (report["tied"] or {}).items()
        wrong += [alias for alias, name in tied if digests.get(alias) != digests.get(name)]
    return none_of("layers are parameters of the model, each once", wrong, f"{len(names)} layers")


def _hashes(report: Document) -> Check:
    forgotten = report["forgotten"]
    hashes, repeated = forgotten.get("hashes", []), forgotten.get("repeated", {})
    count = len(hashes) + sum(times - 1 for times in repeated.values())
    wrong = [value for value in hashes if not re.fullmatch("[0-9a-f]{24}", value)]
    wrong += [value for value, times in repeated.items() if times < 2 or value not in hashes]
    if wrong or len(set(hashes)) < len(hashes):
        return Check("hashes of forgotten samples", False, "not distinct hashes of 24 hex digits")
    return equal("hashes of forgotten samples", count, report["forget_samples"])


def _gaps(after: Document) -> Check:
    figures, spread = after["figures"], after["spread"]
    wrong = [
        name
        for name, gap in after["gaps"].items()
        if name not in figures
        or name not in spread
        or not math.isclose(figures[name] - spread[name]["mean"], gap, abs_tol=1e-6)
    ]
    return none_of("gaps are figure minus gold", wrong, f"{len(after['gaps'])} gaps")


def digest_of_all(report: Document, when: str) -> Iterator[Check]:
    """The digest that page and card print: of the digests, tensor by tensor."""
    what = f"digest of the model {when}, as page and card print it"
    if report[f"model_{when}"] is None:
        return
    if report["schema"] == 2:  # over the tensors themselves, some of which no checkpoint holds
        yield Check(what, None, "a report of schema 2 does not say what it covers")
        return
    right = report[f"model_{when}"] == bits.combined(report[f"checkpoint_{when}"])
    yield Check(what, right, f"{'' if right else 'not '}that of the tensors' digests")
