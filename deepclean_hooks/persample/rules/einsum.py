"""einsum with a parameter: the parameter gets the samples' index, so its gradient is one for each.

`bi,ij->bj` with data (b, i) becomes `bi,bij->bj` on the parameter expanded to (N, i, j): the same
sum, whose gradient with respect to the expansion holds sample n's gradient at position n.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Layout, Unserved
from deepclean_hooks.persample.rules.broadcast import Broadcast


class Einsum(Broadcast):
    """Operand: w, expanded to one copy for each sample; its gradient takes as much."""

    def bytes_per_sample(self) -> int:
        """The gradient of one copy."""
        operand = self.operands["w"]
        return operand.numel() * operand.element_size()


def meet_einsum(call: Call) -> Tensor:
    """`einsum(equation, *operands)` in which every data operand has the samples under one index."""
    equation, operands = _arguments(call)
    terms, output = _parsed(equation, len(operands))
    letters = {
        _sample_letter(call, operand, term)
        for operand, term in zip(operands, terms, strict=True)
        if call.is_data(operand)
    }
    if len(letters) != 1:
        raise Unserved("the samples go under several indices")
    (letter,) = letters
    if letter not in output:
        raise Unserved("the samples are summed over")
    for i, operand in enumerate(operands):
        if call.is_parameter(operand):
            if letter in terms[i]:
                raise Unserved("the parameter varies along the samples")
            terms[i] = letter + terms[i]
            copies = operand.detach().expand(call.n, *operand.shape)
            operands[i] = call.tap(copies, Einsum(operand, call.n, Layout(0)))
        elif not call.is_data(operand) and letter in terms[i]:
            raise Unserved("a constant varies along the samples")
    result: Tensor = torch.einsum(f"{','.join(terms)}->{output}", *operands)
    return result


def _arguments(call: Call) -> tuple[str, list[Tensor]]:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or call.kwargs:
        raise Unserved("einsum with an ellipsis or with sublists")
    return equation.replace(" ", ""), operands


def _parsed(equation: str, count: int) -> tuple[list[str], str]:
    """The terms and the output; without an arrow the output is every index used once, in order."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != count or any(len(set(term)) < len(term) for term in terms):
        raise Unserved("einsum with a repeated index")
    if not arrow:
        used = Counter("".join(terms))
        output = "".join(sorted(letter for letter, times in used.items() if times == 1))
    return terms, output


def _sample_letter(call: Call, operand: Tensor, term: str) -> str:
    layout = call.layout(operand)
    if not isinstance(layout, Layout):
        raise Unserved("the samples could not be told apart")
    if layout.outer != 1 or operand.shape[layout.dim] != call.n:
        raise Unserved("the samples are folded into another index")
    return term[layout.dim]


HANDLERS: Handlers = {torch.einsum: meet_einsum}
