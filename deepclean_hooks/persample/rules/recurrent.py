"""LSTM, GRU and plain recurrent layers, unrolled: h' = step(x W_ih^T + b_ih, h W_hh^T + b_hh).

N: samples, T: steps, D: inputs, H: hidden units, G: gates (4 of an LSTM, 3 of a GRU, 1). Both
products are linear layers over the steps. That of the hidden states is summed at once: zeros of
shape (N, T, G H) are added to it step by step, and their gradient is that of all its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import PARAMETER, Call, Handler, Handlers, kind
from deepclean_hooks.persample.layout import Unserved
from deepclean_hooks.persample.rules.linear import Linear

State = tuple[Tensor, ...]
"""The hidden state (N, H), and an LSTM's cell state after it."""

Step = Callable[[Tensor, Tensor, State], State]
"""The next state from both products (N, G H) and the state before."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    update = (xz + hz).sigmoid()
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((1 - update) * new + update * state[0],)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _direction(
    call: Call,
    x: Tensor,
    first: State,
    weights: Sequence[Tensor],
    time: int,
    step: Step,
    back: bool,
) -> tuple[Tensor, State]:
    """The hidden states of one layer in one direction, stacked over `time`, and the last state."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    outside = Linear(call.operands(weight=w_ih, bias=b_ih), call.n, x, call.layout(x))
    inputs = call.serve(F.linear(x, call.cut(w_ih), call.cut(b_ih)), outside)  # (N, T, G H)
    inside = Linear(call.operands(weight=w_hh, bias=b_hh), call.n, x, call.layout(x))
    added = call.tap(torch.zeros_like(inputs), inside)
    state, before, after = first, [], []
    steps = list(zip(inputs.unbind(time), added.unbind(time), strict=True))
    for from_input, zero in reversed(steps) if back else steps:
        before.append(state[0])
        from_state = F.linear(state[0], call.cut(w_hh), call.cut(b_hh)) + zero
        state = step(from_input, from_state, state)
        after.append(state[0])
    if back:
        before, after = before[::-1], after[::-1]
    inside.keep(torch.stack(before, time))
    return torch.stack(after, time), state


def _meet(step: Step, states: int) -> Handler:
    def meet(call: Call) -> Any:
        """`torch.lstm` and the like with a batch of whole sequences."""
        if len(call.args) != 9:
            raise Unserved("a recurrent layer over packed sequences")
        x, initial, weights, bias, layers, dropout, training, both, batch_first = call.args
        initial = list(initial) if isinstance(initial, list | tuple) else [initial]
        each = (4 if bias else 2) * (1 + both)
        if x.dim() != 3 or len(weights) != each * layers or (training and dropout):
            raise Unserved("a recurrent layer with projections, dropout or a single sequence")
        if not call.is_data(x) or kind(initial) & PARAMETER:
            raise Unserved("a recurrent layer whose first state is a parameter")
        last: list[State] = []
        for _ in range(layers):
            outputs = []
            for back in range(1 + both):
                at = len(last)
                part = weights[at * (each // (1 + both)) : (at + 1) * (each // (1 + both))]
                first = tuple(s[at] for s in initial)
                out, state = _direction(call, x, first, part, int(batch_first), step, bool(back))
                outputs.append(out)
                last.append(state)
            x = torch.cat(outputs, -1) if both else outputs[0]
        final = [torch.stack([state[i] for state in last]) for i in range(states)]
        return (x, *final)

    return meet


HANDLERS: Handlers = {
    torch._VF.lstm: _meet(_lstm, 2),
    torch._VF.gru: _meet(_gru, 1),
    torch._VF.rnn_tanh: _meet(_tanh, 1),
    torch._VF.rnn_relu: _meet(_relu, 1),
}
