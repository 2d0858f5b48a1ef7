"""Regulator cells: convolutional RNNs that run along the depth of a ResNet stage.

Paper: RegNet: Self-Regulated Network for Image Classification, https://arxiv.org/abs/2101.00590.

Shapes used throughout: x, h and c are (B, N, H, W); the folded gate kernel is (G, N, 2, 3, 3) and its bias (G, N),
where N is the block's inner width and G the number of gates. Tap 0 of the axis of size two reads x, tap 1 reads h.
"""

from typing import Any, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn

from .ops import conv_gru_step, conv_lstm_step, conv_rnn_step

__all__ = ['RegulatorCell', 'ConvRNN', 'ConvGRU', 'ConvLSTM', 'CELLS']


class RegulatorCell(nn.Module):
    """What the three cells share: G gates, each the paper's two-step convolution DW3x3(PW1x1(x ∥ h)).

    Our readings of the paper, which leaves these open:
      * The channels of x and h are interleaved, so that group n of PW holds exactly (x_n, h_n). Over the plain
        concatenation [x, h] a grouped PW would pair x with x and h with h, and the cell would never mix the two.
      * The bias sits on DW alone, so that PW and DW fold exactly, at the borders too.
      * The state starts at zero.
      * Weights start as LeCun normals (variance 1 / fan-in), which keep a pre-activation at the scale of its inputs.

    The gates' weights are stored stacked: `pw` (G, N, 2), `dw` (G, N, 3, 3), `bias` (G, N); no tensor has five axes,
    because `model.to(memory_format=torch.channels_last)` refuses those.

    Attributes:
        gates: Names of the gates in stacking order, in the paper's letters.
        step: The update in functional form, (x, h, c, weight, bias) -> (h', c').
    """

    gates: Tuple[str, ...] = ()
    step: Any = None

    def __init__(self, width: int, device=None, dtype=None) -> None:
        """
        Args:
            width: Channels N of x, h and c.
            device: Where to put the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: width is below 1.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f'{type(self).__name__}: width must be at least 1, got {width}.')
        dd = {'device': device, 'dtype': dtype}
        self.width = width
        self.is_regulator = True  # tells the cell from a stage's blocks, in TorchScript too
        self.pw = nn.Parameter(torch.empty(len(self.gates), width, 2, **dd))
        self.dw = nn.Parameter(torch.empty(len(self.gates), width, 3, 3, **dd))
        self.bias = nn.Parameter(torch.empty(len(self.gates), width, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        nn.init.normal_(self.pw, std=2**-0.5)
        nn.init.normal_(self.dw, std=9**-0.5)
        nn.init.zeros_(self.bias)

    def kernel(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """PW and DW of every gate folded into one grouped 3x3 convolution.

        A stage calls this once per forward pass and gives the result to all its blocks.

        Returns:
            Weight (G, N, 2, 3, 3) and bias (G, N).
        """
        if hasattr(self, 'weight'):
            return self.weight.unflatten(0, (-1, self.width)), self.bias
        return self.pw[..., None, None] * self.dw.unsqueeze(2), self.bias

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Store `weight` (G * N, 2, 3, 3), the folded kernel, instead of PW and DW.

        `timm.utils.reparameterize_model` calls this. A cell whose weights are computed at each call (pruned) stays.
        """
        if {'pw', 'dw'} <= set(self._parameters):
            self.weight = nn.Parameter(self.kernel()[0].detach().flatten(0, 1))
            del self.pw, self.dw

    def forward(
        self,
        x: torch.Tensor,
        h: Optional[torch.Tensor] = None,
        c: Optional[torch.Tensor] = None,
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """One step along depth.

        Args:
            x: Input (B, N, H, W).
            h: Hidden state (B, N, H, W), None for zero.
            c: Cell state (B, N, H, W), None for zero. Only ConvLSTM reads it.
            weight: The folded kernel, from `kernel`; folded here if None.
            bias: Its bias, likewise.

        Returns:
            The new h and c, each (B, N, H, W); where the cell has no c, h stands for it.
        """
        if weight is None or bias is None:
            weight, bias = self.kernel()
        h, c = self.step(x, h, c, weight, bias)
        return h, h if c is None else c

    def extra_repr(self) -> str:
        """The width, for `repr`."""
        return str(self.width)


class ConvRNN(RegulatorCell):
    """h' = tanh(gate_h(x, h))."""

    gates = ('h',)
    step = staticmethod(conv_rnn_step)


class ConvGRU(RegulatorCell):
    """z = σ(gate_z(x, h)), r = σ(gate_r(x, h)), n = tanh(gate_n(x, r ⊙ h)), h' = (1 - z) ⊙ h + z ⊙ n."""

    gates = ('z', 'r', 'n')
    step = staticmethod(conv_gru_step)


class ConvLSTM(RegulatorCell):
    """i, f, o = σ(gate(x, h)), g = tanh(gate_g(x, h)), c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh(c').

    The forget gate's bias starts at 1 (our reading).
    """

    gates = ('i', 'f', 'o', 'g')
    step = staticmethod(conv_lstm_step)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero, the forget gate's one."""
        super().reset_parameters()
        with torch.no_grad():
            self.bias[self.gates.index('f')] = 1.0


CELLS: Dict[str, Type[RegulatorCell]] = dict(convrnn=ConvRNN, convgru=ConvGRU, convlstm=ConvLSTM)
