"""RegNet: ResNets and SE-ResNets whose blocks share a regulator, a convolutional RNN that runs along depth.

Paper: RegNet: Self-Regulated Network for Image Classification, https://arxiv.org/abs/2101.00590. It is not the RegNet
of "Designing Network Design Spaces" (timm's regnetx / regnety).

Everything that is ResNet here is timm's: stem, blocks, SE, shortcuts, head and their state dict names. A stage adds the
regulator, a block adds the fuse convolution and two norms. A timm ResNet checkpoint therefore loads with only the
regulator's keys missing (see warm_start.py).
"""

import inspect
from contextlib import nullcontext
from functools import partial
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.trace_utils import _assert
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv_rnn import CELLS, RegulatorCell
from .ops import batch_norm_relu, fused_on_cpu

__all__ = ['RegulatedBasicBlock', 'RegulatedBottleneck', 'RegulatedStage', 'RegulatedResNet']

CARRIES = ('norm', 'raw')


def _one_of(name: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in tuple(valid):
        raise ValueError(f'{name} must be one of {", ".join(repr(v) for v in valid)}; got {value!r}.')


def fold_norm(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold `parent`'s batch norm into the convolution before it; any other norm is left as it is."""
    conv, norm = getattr(parent, conv_name, None), getattr(parent, norm_name, None)
    if (
        type(conv) in (nn.Conv2d, FuseConv2d)
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and norm.track_running_stats
    ):
        setattr(parent, conv_name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
        setattr(parent, norm_name, nn.Identity())


def fold_sequential(module: Optional[nn.Module]) -> None:
    """Fold every batch norm of a Sequential that directly follows a convolution."""
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        for conv_name, norm_name in zip(names, names[1:]):
            fold_norm(module, conv_name, norm_name)


def fold_stem(net: nn.Module) -> None:
    """Fold the batch norms of a net's stem: those inside a deep stem or a convolutional stem pool, and `bn1`."""
    fold_sequential(net.conv1)
    fold_sequential(net.maxpool)
    if isinstance(net.conv1, nn.Sequential):
        net.conv1.append(net.bn1)
        fold_sequential(net.conv1)
        net.bn1 = net.conv1[-1]
        del net.conv1[-1]
    else:
        fold_norm(net, 'conv1', 'bn1')


class _StemFold:
    """Calls `fold_stem` on the net that a `conv1` belongs to; a copy of the `conv1` alone belongs to none."""

    def __init__(self, net: Optional[nn.Module]) -> None:
        self.net = net

    def __call__(self) -> None:
        if self.net is not None:
            fold_stem(self.net)

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_StemFold':
        return _StemFold(memo.get(id(self.net)))


def link_stem(net: nn.Module) -> None:
    """Let `timm.utils.reparameterize_model` fold the stem: it asks the children of a net, and never the net itself."""
    net.conv1.reparameterize = _StemFold(net)


def is_batch_norm_relu(norm: nn.Module, act: nn.Module) -> bool:
    """Whether the two compute ReLU(BN(x)) and nothing listens in between, so that one op may do the work of both."""
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) is nn.ReLU
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and not any(getattr(module, hook) for module in (norm, act) for hook in hooks)
        and not torch.nn.modules.module._has_any_global_hook()
    )


def norm_act(norm: nn.Module, act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """act(norm(x)); a batch norm and ReLU that are trained are one op where that saves passes over memory.

    Left to itself: a graph that torch.compile fuses, and a single value per channel, which torch refuses.
    """
    trained = norm.training and not torch.compiler.is_compiling()
    if not (trained and is_batch_norm_relu(norm, act) and fused_on_cpu(x) and x.numel() > x.shape[1]):
        return act(norm(x))
    x, mean, var = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
    values = x.numel() // x.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (values / (values - 1)), norm.momentum)
    return x


def no_grad_on_cpu(x: torch.Tensor) -> bool:
    """Whether x is computed with on the CPU in float32 and channels_last, for no gradient and no compiler."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and fused_on_cpu(x)


def scale_and_shift(norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm in eval mode does to each channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class FuseConv2d(nn.Conv2d):
    """The fuse convolution, 1x1 over [x, h], as the sum of two convolutions: [x, h] is never written to memory."""

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) and state (B, N, H, W) to features (B, C, H, W)."""
        if not torch.jit.is_scripting() and no_grad_on_cpu(x):
            return self.as_matmul(x, h)
        width = x.shape[1]
        return F.conv2d(x, self.weight[:, :width], self.bias).add_(F.conv2d(h, self.weight[:, width:]))

    @torch.jit.ignore
    def as_matmul(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """The same over channels_last, as matrix products of which the second adds to the first's result in place."""
        weight, width = self.weight.flatten(1), x.shape[1]
        out = F.linear(x.permute(0, 2, 3, 1), weight[:, :width], self.bias)
        out.view(-1, weight.shape[0]).addmm_(h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]), weight[:, width:].t())
        return out.permute(0, 3, 1, 2)


class _Foldable:
    """Gives a block the method by which `timm.utils.reparameterize_model` folds its batch norms."""

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold every batch norm that follows a convolution; in place, for inference only."""
        for conv_name, norm_name in (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3'), ('conv_fuse', 'bn_fuse')):
            fold_norm(self, conv_name, norm_name)
        fold_sequential(self.downsample)


class PlainBasicBlock(_Foldable, BasicBlock):
    """timm's BasicBlock, foldable."""


class PlainBottleneck(_Foldable, Bottleneck):
    """timm's Bottleneck, foldable."""


class _Regulated(_Foldable):
    """What the regulated blocks add to timm's: the norm of h, the fuse convolution, and one step of the regulator.

    Attributes:
        fuse_after: The convolution whose features the state joins.
    """

    fuse_after = ''

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
        dd = {k: kwargs.get(k) for k in ('device', 'dtype')}
        self.state_width = self.conv1.out_channels
        width = getattr(self, self.fuse_after).out_channels
        self.step = CELLS[regulator].step
        self.carry_norm = carry == 'norm'
        self.regulator = None if share_regulator else CELLS[regulator](self.state_width, **dd)
        self.bn_h = norm_layer(self.state_width, **dd)
        self.act_h = act_layer(inplace=True)
        self.conv_fuse = FuseConv2d(width + self.state_width, width, kernel_size=1, bias=False, **dd)
        self.bn_fuse = norm_layer(width, **dd)
        self.act_fuse = act_layer(inplace=True)

    def regulate(
        self,
        x: torch.Tensor,
        main: torch.Tensor,
        h: Optional[torch.Tensor],
        c: Optional[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """Advance the regulator by one step and fuse its state into the block.

        Args:
            x: What the regulator reads (B, N, H, W).
            main: The block's features that the state joins (B, C, H, W).
            h, c: State left by the previous block, None at the start of a stage.
            weight, bias: The regulator's folded kernel, from `RegulatorCell.kernel`.

        Returns:
            The fused features (B, C, H, W), and the state for the next block.
        """
        if torch.jit.is_scripting():
            raw, c = self.step(x, h, c, weight, bias)
            h = self.act_h(self.bn_h(raw))
            main = self.act_fuse(self.bn_fuse(self.conv_fuse(main, h)))
        else:
            if self.norm_in_step(x):
                h, c = self.step(x, h, c, weight, bias, *scale_and_shift(self.bn_h))
                raw = h
            else:
                raw, c = self.step(x, h, c, weight, bias)
                h = norm_act(self.bn_h, self.act_h, raw)
            main = norm_act(self.bn_fuse, self.act_fuse, self.conv_fuse(main, h))
        return main, h if self.carry_norm else raw, c

    def norm_in_step(self, x: torch.Tensor) -> bool:
        """Whether the regulator's step can do the work of `bn_h` and `act_h` too: in eval mode, without gradients."""
        eval_mode = self.carry_norm and not self.bn_h.training
        return eval_mode and is_batch_norm_relu(self.bn_h, self.act_h) and no_grad_on_cpu(x)

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

    def forward(
        self,
        x: torch.Tensor,
        h: Optional[torch.Tensor],
        c: Optional[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """One block, one time step of the regulator; arguments and state as in `regulate`.

        Returns:
            The block's features (B, C, H, W), and h and c for the next block.
        """
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x, h, c = self.regulate(x, x, h, c, weight, bias)

        x = self.conv2(x)
        x = self.bn2(x)
        return self.act2(self.join(x, shortcut)), h, c


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

    def forward(
        self,
        x: torch.Tensor,
        h: Optional[torch.Tensor],
        c: Optional[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """One block, one time step of the regulator; arguments and state as in `regulate`.

        Returns:
            The block's features (B, C, H, W), and h and c for the next block.
        """
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        read = self.pool(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        x, h, c = self.regulate(read, x, h, c, weight, bias)

        x = self.conv3(x)
        x = self.bn3(x)
        return self.act3(self.join(x, shortcut)), h, c


class RegulatedStage(nn.ModuleList):
    """A stage: regulated blocks, named '0', '1', ... as in timm, and the regulator whose time steps they are.

    As a sequence it holds the blocks alone: `stage[-1]`, `len(stage)` and iteration do not see the regulator.

    Our reading: the state starts at zero at the first block of every stage, where map size and width change.
    """

    def __init__(self, blocks: Iterable[nn.Module], regulator: Optional[RegulatorCell]) -> None:
        """
        Args:
            blocks: Regulated blocks, in order.
            regulator: The cell they share, or None if each block has its own.
        """
        super().__init__(blocks)
        self.grad_checkpointing = False
        self.regulator = regulator

    def __len__(self) -> int:
        return len(self._modules) - ('regulator' in self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([m for name, m in self._modules.items() if name != 'regulator'])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) through the blocks; the state lives here only."""
        h: Optional[torch.Tensor] = None
        c: Optional[torch.Tensor] = None
        if self.regulator is not None:
            weight, bias = self.regulator.kernel()
        for block in self:
            if hasattr(block, 'conv1'):  # TorchScript iterates over all submodules, the regulator too
                if block.regulator is not None:
                    weight, bias = block.regulator.kernel()
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, h, c = checkpoint(block, x, h, c, weight, bias)
                else:
                    x, h, c = block(x, h, c, weight, bias)
        return x


BLOCKS = dict(basic=(RegulatedBasicBlock, PlainBasicBlock), bottleneck=(RegulatedBottleneck, PlainBottleneck))
STEMS = ('', 'deep', 'deep_tiered', 'cifar')


class RegulatedResNet(ResNet):
    """ResNet or SE-ResNet with a regulator per stage; without one (`regulator=None`) it is timm's ResNet.

    One class for both stems: timm's for ImageNet, and `stem_type='cifar'`, a 3x3 convolution of the first stage's width
    with no pooling, for 32x32 images.
    """

    def __init__(
        self,
        block: str = 'basic',
        layers: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = 'avg',
        stem_type: str = '',
        channels: Sequence[int] = (64, 128, 256, 512),
        act_layer='relu',
        norm_layer='batchnorm2d',
        regulator: Optional[str] = 'convlstm',
        regulated_stages: Optional[Union[int, Sequence[int]]] = None,
        share_regulator: bool = True,
        carry: str = 'norm',
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        """
        Args:
            block: 'basic' or 'bottleneck'.
            layers: Blocks per stage.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of image channels.
            output_stride: Strides beyond it become dilation: 8, 16 or 32, with the CIFAR stem 2, 4, 8, 16 or 32.
            global_pool: timm's pooling name, e.g. 'avg', 'max', 'avgmax', or '' for none.
            stem_type: timm's '', 'deep', 'deep_tiered', or 'cifar'.
            channels: Width of each stage.
            act_layer: Activation, name or class.
            norm_layer: Normalization, name or class.
            regulator: 'convrnn', 'convgru', 'convlstm', or None or 'none' for a ResNet (`timm.create_model` drops
                arguments that are None, so 'none' is the one to give it).
            regulated_stages: Stages that have a regulator, counted from 1 as in `layer1`; None for all.
            share_regulator: One cell per stage (the paper), or one per block.
            carry: h for the next block: 'norm' (after BN and ReLU) or 'raw' (the cell's own).
            device: Where to create the model.
            dtype: Floating point type of parameters and buffers.
            **kwargs: Any other argument of timm's ResNet.

        Raises:
            TypeError: An argument neither timm's ResNet nor this class has.
            ValueError: A value out of its range.
        """
        names = [n for cls in (RegulatedResNet, ResNet) for n in inspect.signature(cls.__init__).parameters]
        valid = [n for n in dict.fromkeys(names) if n not in ('self', 'kwargs')]
        unknown = [k for k in kwargs if k not in valid]
        if unknown:
            raise TypeError(f'unknown argument {", ".join(map(repr, unknown))}; valid are {", ".join(valid)}.')
        num_stages = len(channels)
        if regulated_stages is None:
            regulated_stages = range(1, num_stages + 1)
        elif isinstance(regulated_stages, int):
            regulated_stages = (regulated_stages,)
        cifar = stem_type == 'cifar'
        _one_of('block', block, BLOCKS)
        _one_of('stem_type', stem_type, STEMS)
        _one_of('regulator', regulator, (*CELLS, 'none', None))
        regulator = None if regulator == 'none' else regulator
        _one_of('carry', carry, CARRIES)
        _one_of('output_stride', output_stride, (2, 4, 8, 16, 32) if cifar else (8, 16, 32))
        for stage in regulated_stages:
            _one_of('regulated_stages', stage, range(1, num_stages + 1))
        if not 1 <= num_stages <= 4:
            raise ValueError(f'channels must be 1 to 4 widths, one per stage; got {tuple(channels)}.')
        if len(layers) != num_stages or not all(isinstance(n, int) and n > 0 for n in layers) or sum(layers) < 2:
            raise ValueError(
                f'layers must be {num_stages} positive block counts, one per width and two blocks in all; '
                f'got {tuple(layers)}.'
            )
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f'in_chans must be at least 1 and num_classes 0; got {in_chans} and {num_classes}.')
        if cifar and (channels[0] % 2 or kwargs.get('replace_stem_pool') or kwargs.get('stem_width')):
            raise ValueError("stem_type='cifar' takes an even channels[0], no replace_stem_pool and no stem_width.")

        regulated_block, plain_block = BLOCKS[block]
        regulated_block = partial(regulated_block, regulator=regulator, carry=carry, share_regulator=share_regulator)
        regulated_block.expansion = plain_block.expansion
        regulated = [regulator is not None and i + 1 in regulated_stages for i in range(num_stages)]
        if cifar:
            # timm's deep stem has 2 x stem_width channels; its layers are replaced below
            kwargs.update(stem_width=channels[0] // 2)

        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                tuple(regulated_block if r else plain_block for r in regulated),
                tuple(layers),
                num_classes=num_classes,
                in_chans=in_chans,
                output_stride=min(32, output_stride * 4) if cifar else output_stride,
                global_pool=global_pool,
                stem_type='deep' if cifar else stem_type,
                channels=tuple(channels),
                act_layer=act_layer,
                norm_layer=norm_layer,
                **kwargs,
            )
            self.in_chans = in_chans
            if cifar:
                self.conv1 = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False)
                nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
                self.maxpool = nn.Identity()
                self.feature_info = [dict(info, reduction=max(1, info['reduction'] // 4)) for info in self.feature_info]
            self.stage_names = [f'layer{i + 1}' for i in range(num_stages)]
            for name, r in zip(self.stage_names, regulated):
                if r:
                    blocks = getattr(self, name)
                    cell = CELLS[regulator](blocks[0].state_width) if share_regulator else None
                    setattr(self, name, RegulatedStage(blocks, cell))
            for i in range(num_stages, 4):
                setattr(self, f'layer{i + 1}', nn.Sequential())  # timm's ResNet names four
        link_stem(self)
        if dtype is not None:
            self.to(dtype=dtype)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Draw new weights: timm's for everything that is ResNet, the cells' own for the regulators.

        Args:
            zero_init_last: Start the last norm of each residual branch at zero.
        """
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, RegulatorCell):
                module.reset_parameters()

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As torch's, but a checkpoint that does not fit is refused in one line.

        Raises:
            RuntimeError: Keys are missing or unexpected (only if `strict`), or a shape differs.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as e:
            first, *problems = (line.strip() for line in str(e).splitlines())
            if not problems:
                raise
            if len(problems[0]) > 300:
                problems[0] = problems[0][:300] + ' ...'
            more = f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''
            raise RuntimeError(
                f'the checkpoint does not fit this {type(self).__name__}: {problems[0]}{more} Expected are the weights '
                'of the same depth and regulator.'
            ) from None

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameter groups for layer decay; a stage's regulator belongs to the stage's first block."""
        if coarse:
            return dict(stem=r'^conv1|bn1|maxpool', blocks=r'^layer(\d+)')
        return dict(
            stem=r'^conv1|bn1|maxpool',
            blocks=[(r'^layer(\d+)\.(\d+)', None), (r'^layer(\d+)\.regulator', (0,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass; the regulator's state passes through the checkpoints."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, RegulatedStage):
                module.grad_checkpointing = enable

    def _forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        _assert(x.ndim == 4, f'expected a batch of images (B, C, H, W), got a tensor of shape {x.shape}')
        _assert(x.shape[1] == self.in_chans, f'expected {self.in_chans} channels (B, C, H, W), got shape {x.shape}')
        x = self.conv1(x)
        x = self.bn1(x)
        return self.act1(x)

    def _forward_stage(self, name: str, x: torch.Tensor) -> torch.Tensor:
        stage = getattr(self, name)
        if self.grad_checkpointing and not isinstance(stage, RegulatedStage):
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) to features (B, num_features, H / reduction, W / reduction)."""
        x = self._forward_stem(x)
        x = self.maxpool(x)
        if torch.jit.is_scripting():
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
            x = self.layer4(x)
        else:
            for name in self.stage_names:
                x = self._forward_stage(name, x)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features of the stem and of every stage.

        Args:
            x: Images (B, C, H, W).
            indices: Take the last n if int, all if None, else those given; 0 is the stem, i is `layer{i}`.
            norm: Unused; there is no final norm.
            stop_early: Do not compute past the last one taken.
            output_fmt: 'NCHW', the only format.
            intermediates_only: Return the intermediate features alone.

        Returns:
            The final features and the list of intermediate ones, or just the list.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self._forward_stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        for i, name in enumerate(self.stage_names[:max_index] if stop_early else self.stage_names):
            x = self._forward_stage(name, x)
            if i + 1 in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages after the last feature taken, and the head.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Unused; there is no final norm.
            prune_head: Remove the classifier.

        Returns:
            The indices kept, none of them negative.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        for name in self.stage_names[max_index:]:
            setattr(self, name, nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if max_index < len(self.stage_names):
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            prune_head = True
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices
