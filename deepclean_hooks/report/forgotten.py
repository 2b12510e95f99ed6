"""Who was forgotten, written so that only someone who holds a sample, or guesses it exactly, can
look it up: salted hashes."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.samples import Data, samples_of


def salted(fingerprints: Iterable[int]) -> dict[str, Any]:
    """{"salt", "hashes", "repeated"}: the hash of each sample's 64-bit fingerprint, sorted, under a
    fresh salt, which keeps two reports from being compared sample by sample; and how often those
    occur that samples of equal content share."""
    salt = ranks.gather(secrets.token_hex(16))[0]
    counts = Counter(_hash(fingerprint, salt) for fingerprint in fingerprints)
    repeated = {value: count for value, count in sorted(counts.items()) if count > 1}
    return {"salt": salt, "hashes": sorted(counts), "repeated": repeated}


def among(forgotten: Mapping[str, Any], batch: Batch) -> list[bool]:
    """For each sample of a batch whether it is among the `forgotten` of a report.

    The batch must be as it was read then: the same preprocessing and dtype, collated by torch's
    default function. `samples_among` takes samples that are collated otherwise.
    """
    return _known(forgotten, batches.sample_ids(batch))


def samples_among(forgotten: Mapping[str, Any], data: Data) -> list[bool]:
    """For each sample of a data set or loader, in index order, whether it is among the `forgotten`
    of a report, whatever the collate function."""
    return _known(forgotten, [known for ids, _ in samples_of(data).identified() for known in ids])


def _known(forgotten: Mapping[str, Any], fingerprints: Iterable[int]) -> list[bool]:
    hashes, salt = set(forgotten["hashes"]), forgotten["salt"]
    return [_hash(fingerprint, salt) in hashes for fingerprint in fingerprints]


def _hash(fingerprint: int, salt: str) -> str:
    data = fingerprint.to_bytes(8, "little", signed=True)
    return hashlib.blake2b(data, key=bytes.fromhex(salt), digest_size=12).hexdigest()
