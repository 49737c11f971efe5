"""A convolutional LSTM over the frames of a clip, in both directions of time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvLSTM(nn.Module):
    """Shi et al. (2015), equation 3, without peepholes: an LSTM whose products are 2-D convolutions.

    Of x_t and the hidden state h (both 0 before the first frame, as the cell c is):

        i, f, o = sigmoid(parts of input(x_t) + recurrent(h)), g = tanh(the fourth part)
        c = f * c + i * g,  h = o * tanh(c)

    The second direction sees the frames from the last to the first, with weights of its own. Both run side by side, as
    groups of one convolution a frame; the input's convolution runs on all frames at once.

    Args:
        channels: of the input.
        hidden: channels of h, in each direction.
        kernel: of both convolutions, in H and W; odd.
    """

    def __init__(self, channels: int, hidden: int, kernel: int = 3) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, for the state to keep its size; got {kernel}")
        self.hidden = hidden
        # Channels: (direction, gate i f o g, hidden). Both have five dimensions, as every weight of the package.
        size, padding = (1, kernel, kernel), (0, kernel // 2, kernel // 2)
        self.input = nn.Conv3d(channels, 8 * hidden, size, padding=padding)
        self.recurrent = nn.Conv3d(2 * hidden, 8 * hidden, size, padding=padding, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) -> (N, 2 * hidden, T, H, W): h of every frame, that of the first direction first."""
        onward, back = self.input(x).chunk(2, 1)
        hidden: Tensor | None = None
        cell: Tensor | None = None
        states = []
        for gates in torch.cat([onward, back.flip(2)], 1).split(1, 2):
            if hidden is not None:
                gates = gates + self.recurrent(hidden)
            i, f, o, g = gates.unflatten(1, (2, 4, self.hidden)).unbind(2)
            new = i.sigmoid() * g.tanh()
            cell = new if cell is None else f.sigmoid() * cell + new
            hidden = (o.sigmoid() * cell.tanh()).flatten(1, 2)
            states.append(hidden)
        onward, back = torch.cat(states, 2).chunk(2, 1)
        return torch.cat([onward, back.flip(2)], 1)
