"""Which rule serves which torch function: one table, one file a kind of operation."""

from deepclean_hooks.persample.call import merge
from deepclean_hooks.persample.rules import (
    broadcast,
    convolution,
    einsum,
    embedding,
    linear,
    normalization,
    recurrent,
)

HANDLERS = merge(
    module.HANDLERS
    for module in (linear, convolution, normalization, embedding, einsum, broadcast, recurrent)
)
