"""The blocks of RegNet: timm's basic block and bottleneck with one time step of a regulator inside.

Paper: RegNet: Self-Regulated Network for Image Classification, https://arxiv.org/abs/2101.00590, sections 3.2 and 3.3,
Fig. 3 and 4. A block is split at the regulator: `enter` computes what the cell reads, `fuse_state` joins the state to
the features, `leave` is the rest. Everything that is ResNet stays timm's.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck

from . import ops
from .conv_rnn import CELLS, RegulatorCell
from .layers import (
    batch_norm_in_op,
    fuse,
    fuse_in_norm_step,
    fuse_in_step,
    fuse_kernel,
    is_step,
    norm_act,
    norm_in_step,
    scale_and_shift,
    step_norm_act,
    step_norm_fuse,
)
from .reparameterize import fold_norm, fold_sequential

__all__ = ['BLOCKS', 'RegulatedBasicBlock', 'RegulatedBottleneck', 'TimeStep']


class _Foldable(nn.Module):
    """Gives a block the method by which `timm.utils.reparameterize_model` folds its batch norms."""

    if TYPE_CHECKING:  # timm's block has these
        conv1: nn.Conv2d
        aa: Any
        se: Any
        drop_path: Any
        downsample: Any

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold every batch norm that follows a convolution; in place, for inference only."""
        for conv_name, norm_name in (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3'), ('conv_fuse', 'bn_fuse')):
            fold_norm(self, conv_name, norm_name)
        fold_sequential(self.aa)
        fold_sequential(self.downsample)


class PlainBasicBlock(_Foldable, BasicBlock):
    """timm's BasicBlock, foldable."""


class PlainBottleneck(_Foldable, Bottleneck):
    """timm's Bottleneck, foldable."""


class TimeStep:
    """A block's time step: the regulator with the state it starts from, and, behind the block, the state it leaves.

    It travels beside the features, so that a block takes and returns these alone. A block reads `h` and `c` and writes
    `next`: running it again, as a checkpoint does, gives the same.

    Attributes:
        regulator: The stage's cell, None if the block has its own.
        h, c: State left by the previous block (B, N, H, W), None at the start of a stage.
        weight, bias: The cell's folded kernel, from `RegulatorCell.kernel`; None if the cell folds it itself.
        next: h and c for the next block.
        recorded: Whether autograd recorded the step.
    """

    def __init__(
        self,
        regulator: Optional[RegulatorCell],
        h: Optional[torch.Tensor] = None,
        c: Optional[torch.Tensor] = None,
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
    ) -> None:
        self.regulator, self.h, self.c, self.weight, self.bias = regulator, h, c, weight, bias
        self.next: Tuple[Optional[torch.Tensor], Optional[torch.Tensor]] = (None, None)
        self.recorded = True

    def kernel(self, cell: RegulatorCell) -> Tuple[torch.Tensor, torch.Tensor]:
        """The folded kernel's weight (G, N, 2, 3, 3) and bias (G, N), of the stage or else of the cell."""
        return cell.kernel() if self.weight is None or self.bias is None else (self.weight, self.bias)


class _Regulated(_Foldable):
    """What the regulated blocks add to timm's: the norm of h, the fuse convolution, and one step of the regulator.

    Attributes:
        regulated: A stage gives the block its time step.
        fuse_after: The convolution whose features the state joins.
    """

    regulated = True
    fuse_after = ''

    if TYPE_CHECKING:
        regulator: Optional[RegulatorCell]
        bn_h: nn.Module
        act_h: nn.Module
        bn_fuse: nn.Module
        act_fuse: nn.Module

        def enter(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]: ...

        def leave(self, shortcut: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...

    def __init__(
        self,
        *args,
        regulator: str = 'convlstm',
        carry: str = 'norm',
        share_regulator: bool = True,
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
        **kwargs,
    ) -> None:
        """
        Args:
            regulator: Cell, 'convrnn', 'convgru' or 'convlstm'.
            carry: What the next block receives as h: 'norm' (after BN and ReLU) or 'raw' (the cell's own).
            share_regulator: The stage owns the cell; otherwise the block has its own.
            act_layer: Activation layer class.
            norm_layer: Normalization layer class.
            *args, **kwargs: timm's block.
        """
        super().__init__(*args, act_layer=act_layer, norm_layer=norm_layer, **kwargs)
        dd: Dict[str, Any] = {k: kwargs.get(k) for k in ('device', 'dtype')}
        self.state_width = self.conv1.out_channels
        width = getattr(self, self.fuse_after).out_channels
        self.carry_norm = carry == 'norm'
        self.regulator = None if share_regulator else CELLS[regulator](self.state_width, **dd)
        self.bn_h = norm_layer(self.state_width, **dd)
        self.act_h = act_layer(inplace=True)
        self.conv_fuse = nn.Conv2d(width + self.state_width, width, kernel_size=1, bias=False, **dd)
        self.bn_fuse = norm_layer(width, **dd)
        self.act_fuse = act_layer(inplace=True)

    @torch.jit.ignore
    def forward(self, x: torch.Tensor, step: Optional[TimeStep] = None) -> torch.Tensor:
        """One block, one time step of the regulator.

        Args:
            x: Features (B, C, H, W).
            step: The time step, from the stage; left out, a block with a cell of its own starts from the zero state.

        Returns:
            Features (B, C', H', W').

        Raises:
            TypeError: There is no regulator.
        """
        if step is None:
            step = TimeStep(None)
        cell = self.regulator if step.regulator is None else step.regulator
        if cell is None:
            raise TypeError(
                f'{type(self).__name__} shares the regulator of its stage: call the stage, or a slice of it.'
            )
        main, read = self.enter(x)
        if self.carry_norm and norm_in_step(cell, self.bn_h, self.act_h, read):
            tensors = read, step.h, step.c, *step.kernel(cell), *scale_and_shift(self.bn_h)
            if fuse_in_step(self.conv_fuse, self.bn_fuse, self.act_fuse, read, main):
                kernel = fuse_kernel(self.conv_fuse, self.bn_fuse)
                h, c, main = ops.step_norm_fuse(cell.step, tensors, main, *kernel)
            else:
                raw, c = ops.step_norm_relu(cell.step, *tensors)
                main, h = self.fuse_state(main, raw, normed=True)
        elif self.carry_norm and batch_norm_in_op(read, self.bn_h, self.act_h) and is_step(cell):
            inputs = read, step.h, step.c, *step.kernel(cell)
            if fuse_in_norm_step(self.conv_fuse, self.bn_fuse, self.act_fuse, read, main):
                h, c, main = step_norm_fuse(cell, self.bn_h, main, self.conv_fuse, self.bn_fuse, *inputs)
            else:
                raw, c = step_norm_act(cell, self.bn_h, *inputs)
                main, h = self.fuse_state(main, raw, normed=True)
        else:
            raw, c = cell(read, step.h, step.c, step.weight, step.bias)
            main, h = self.fuse_state(main, raw)
        out = self.leave(x, main)
        step.next, step.recorded = (h, c), torch.is_grad_enabled()
        return out

    def fuse_state(
        self, main: torch.Tensor, raw: torch.Tensor, normed: bool = False
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The state joins the features.

            h = ReLU(BN(h'));  x = ReLU(BN(conv1x1([x, h])))

        Args:
            main: Features (B, C, H, W).
            raw: The cell's h' (B, N, H, W), or h if `normed`.
            normed: The step did the work of BN and ReLU too.

        Returns:
            Features (B, C, H, W), and what the next block receives as h.
        """
        if torch.jit.is_scripting():
            h = self.act_h(self.bn_h(raw))
            main = self.act_fuse(self.bn_fuse(self.conv_fuse(torch.cat([main, h], 1))))
        else:
            h = raw if normed else norm_act(self.bn_h, self.act_h, raw)
            main = fuse(self.conv_fuse, main, h, normed and not self.bn_h.training)
            main = norm_act(self.bn_fuse, self.act_fuse, main)
        return main, h if self.carry_norm else raw

    def join(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """The end of a residual branch: SE, stochastic depth, and the sum with the shortcut."""
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return x


class RegulatedBasicBlock(_Regulated, BasicBlock):
    """The paper's RegNet module: a basic block with the regulator between its two 3x3 convolutions.

        x2 = ReLU(BN(conv3x3(x1)));  h = ReLU(BN(cell(x2, state)));  x3 = ReLU(BN(conv1x1([x2, h])))
        x4 = BN(conv3x3(x3));  out = ReLU(shortcut(x1) + SE(x4))

    Our reading: the state carried to the next block is h after BN and ReLU, and the raw c; `carry='raw'` carries the
    cell's own h'.
    """

    fuse_after = 'conv1'

    def enter(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Up to the regulator: x1 to x2, which is also what the regulator reads."""
        x = self.conv1(x)
        if torch.jit.is_scripting():
            x = self.act1(self.drop_block(self.bn1(x)))
        else:
            x = norm_act(self.bn1, self.act1, x, self.drop_block)
        x = self.aa(x)
        return x, x

    def leave(self, shortcut: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From the fused state on: x1 and x3 to the block's features."""
        x = self.conv2(x)
        x = self.bn2(x)
        return self.act2(self.join(x, shortcut))


class RegulatedBottleneck(_Regulated, Bottleneck):
    """The paper's bottleneck RegNet module: the regulator runs beside the 3x3 convolution.

        x2 = ReLU(BN(conv1x1(x1)));  h = ReLU(BN(cell(pool(x2), state)));  x3 = ReLU(BN(conv3x3(x2)))
        x4 = ReLU(BN(conv1x1([x3, h])));  x5 = BN(conv1x1(x4));  out = ReLU(shortcut(x1) + SE(x5))

    Our readings: timm strides in the 3x3, so where a stage begins with a stride, `pool` is a 2x2 average pool with
    stride 2, rounding up so that odd sizes match the strided 3x3; the carried state as in RegulatedBasicBlock.
    """

    fuse_after = 'conv2'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # timm's own anti-aliasing by AvgPool2d rounds down, everything else up
        round_up = not isinstance(self.aa, nn.AvgPool2d)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=round_up) if self.stride == 2 else nn.Identity()

    def enter(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Up to the regulator: x1 to x3, and pool(x2), which the regulator reads."""
        x = self.conv1(x)
        if torch.jit.is_scripting():
            x = self.act1(self.bn1(x))
            main = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        else:
            x = norm_act(self.bn1, self.act1, x)
            main = norm_act(self.bn2, self.act2, self.conv2(x), self.drop_block)
        return self.aa(main), self.pool(x)

    def leave(self, shortcut: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From the fused state on: x1 and x4 to the block's features."""
        x = self.conv3(x)
        x = self.bn3(x)
        return self.act3(self.join(x, shortcut))


class _Control(_Foldable):
    """What a regulated block has besides the regulator: the fuse convolution, over the features alone.

    Ours, not the paper's: it tells what the memory does from what one more 1x1 convolution does.
    """

    fuse_after = ''

    def __init__(self, *args, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d, **kwargs) -> None:
        super().__init__(*args, act_layer=act_layer, norm_layer=norm_layer, **kwargs)
        dd: Dict[str, Any] = {k: kwargs.get(k) for k in ('device', 'dtype')}
        width = getattr(self, self.fuse_after).out_channels
        layers = dict(
            aa=self.aa,
            conv_fuse=nn.Conv2d(width, width, kernel_size=1, bias=False, **dd),
            bn_fuse=norm_layer(width, **dd),
            act_fuse=act_layer(inplace=True),
        )
        self.aa = nn.Sequential(OrderedDict(layers))  # the last that timm's block applies before the next convolution


class ControlBasicBlock(_Control, BasicBlock):
    """x2 = ReLU(BN(conv3x3(x1)));  x3 = ReLU(BN(conv1x1(x2)));  x4 = BN(conv3x3(x3));  out = ReLU(x1 + SE(x4))."""

    fuse_after = 'conv1'


class ControlBottleneck(_Control, Bottleneck):
    """As Bottleneck, with x4 = ReLU(BN(conv1x1(x3))) between its last two convolutions."""

    fuse_after = 'conv2'


BLOCKS: Dict[str, Dict[str, Any]] = dict(
    basic=dict(regulated=RegulatedBasicBlock, plain=PlainBasicBlock, control=ControlBasicBlock),
    bottleneck=dict(regulated=RegulatedBottleneck, plain=PlainBottleneck, control=ControlBottleneck),
)
