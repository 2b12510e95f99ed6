"""Who was forgotten, told so that only someone who holds a sample can look it up: salted hashes."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch


def salted(fingerprints: Iterable[int]) -> dict[str, Any]:
    """{"salt", "hashes"}: one hash of each sample's 64-bit fingerprint, sorted, under a fresh salt,
    which keeps two reports from being compared sample by sample."""
    salt = ranks.gather(secrets.token_hex(16))[0]
    return {"salt": salt, "hashes": sorted(_hash(one, salt) for one in fingerprints)}


def among(forgotten: Mapping[str, Any], batch: Batch) -> list[bool]:
    """For each sample of a batch whether it is among the `forgotten` of a report.

    The batch must be as it was read then: the same preprocessing, collation and dtype.
    """
    hashes = set(forgotten["hashes"])
    return [_hash(one, forgotten["salt"]) in hashes for one in batches.sample_ids(batch)]


def _hash(fingerprint: int, salt: str) -> str:
    data = fingerprint.to_bytes(8, "little", signed=True)
    return hashlib.blake2b(data, key=bytes.fromhex(salt), digest_size=12).hexdigest()
