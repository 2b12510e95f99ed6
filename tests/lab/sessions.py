"""The network and the samples that the tests of a session share."""

from __future__ import annotations

from functools import partial

from lab import small

samples = small.samples
network = partial(small.network, 8, planted=True)
FORGET, RETAIN = samples(0, 8), samples(8, 40)
