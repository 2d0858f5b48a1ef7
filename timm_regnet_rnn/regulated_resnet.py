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
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers.trace_utils import _assert
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.resnet import ResNet

from .conv_rnn import CELLS, RegulatorCell
from .layers import check_layers, listened, sample_first
from .regulated_block import BLOCKS, RegulatedBasicBlock, RegulatedBottleneck, TimeStep
from .reparameterize import link_stem

__all__ = ['RegulatedBasicBlock', 'RegulatedBottleneck', 'RegulatedStage', 'RegulatedResNet']

CARRIES = ('norm', 'raw')


def _one_of(name: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in tuple(valid):
        raise ValueError(f'{name} must be one of {", ".join(repr(v) for v in valid)}; got {value!r}.')


class RegulatedStage(nn.Sequential):
    """A stage: regulated blocks, named '0', '1', ... as in timm, and the regulator whose time steps they are.

    As a sequence it holds the blocks alone: indices, slices, `del`, `insert` and iteration do not see the regulator. A
    slice is a stage that shares it.

    Our reading: the state starts at zero at the first block of every stage, where map size and width change.
    """

    def __init__(self, blocks: Iterable[nn.Module], regulator: Optional[RegulatorCell]) -> None:
        """
        Args:
            blocks: Regulated blocks, in order; others, for which no time passes, may stand between them.
            regulator: The cell they share, or None if each block has its own.
        """
        super().__init__(*blocks)
        self.grad_checkpointing = False
        self.regulator = regulator

    if TYPE_CHECKING:
        regulator: Optional[RegulatorCell]

    def _set_blocks(self, blocks: Iterable[nn.Module]) -> None:
        cell = self._modules.get('regulator')
        self._modules.clear()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)
        if cell is not None:
            self.add_module('regulator', cell)

    def __len__(self) -> int:
        return len(self._modules) - ('regulator' in self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter([m for name, m in self._modules.items() if name != 'regulator'])

    def __getitem__(self, index: Any) -> Any:
        chosen = list(self)[index]
        if not isinstance(index, slice):
            return chosen
        stage = type(self)(chosen, self.regulator).train(self.training)
        stage.grad_checkpointing = self.grad_checkpointing
        return stage

    def __setitem__(self, index: int, block: nn.Module) -> None:
        blocks = list(self)
        blocks[index] = block
        self._set_blocks(blocks)

    def __delitem__(self, index: Union[int, slice]) -> None:
        blocks = list(self)
        del blocks[index]
        self._set_blocks(blocks)

    def insert(self, index: int, block: nn.Module) -> 'RegulatedStage':
        """Put a block before the one at `index`."""
        blocks = list(self)
        blocks.insert(index, block)
        self._set_blocks(blocks)
        return self

    def append(self, block: nn.Module) -> 'RegulatedStage':
        """Put a block behind the last."""
        return self.insert(len(self), block)

    def extend(self, blocks: Iterable[nn.Module]) -> 'RegulatedStage':
        """Put blocks behind the last."""
        self._set_blocks([*self, *blocks])
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) through the blocks; the state lives here only."""
        h: Optional[torch.Tensor] = None
        c: Optional[torch.Tensor] = None
        if torch.jit.is_scripting():
            if self.regulator is not None:
                weight, bias = self.regulator.kernel()
            for block in self:  # TorchScript iterates over all submodules, the regulator too
                if hasattr(block, 'conv_fuse'):
                    main, read = block.enter(x)
                    if self.regulator is not None:
                        raw, c = self.regulator(read, h, c, weight, bias)
                    else:
                        raw, c = block.regulator(read, h, c)
                    main, h = block.fuse_state(main, raw)
                    x = block.leave(x, main)
                elif not hasattr(block, 'is_regulator'):
                    x = block(x)
            return x
        return self.walk(x)

    @torch.jit.unused
    def walk(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` outside of TorchScript, which takes no module as an argument."""
        h: Optional[torch.Tensor] = None
        c: Optional[torch.Tensor] = None
        weight: Optional[torch.Tensor] = None
        bias: Optional[torch.Tensor] = None
        # a hook may replace the cell's weights at each call, so a cell that is listened to folds them itself
        if self.regulator is not None and not listened(self.regulator):
            weight, bias = self.regulator.kernel()
        for block in self:
            if not getattr(block, 'regulated', False):
                x = block(x)
            elif self.grad_checkpointing:
                x, h, c = checkpoint(partial(self.advance, block), x, h, c, weight, bias)
            else:
                step = TimeStep(self.regulator, h, c, weight, bias)
                x = block(x, step)
                h, c = step.next
                if torch.is_grad_enabled() and not step.recorded:
                    raise RuntimeError(
                        'a block ran without recording gradients, which would cut them off in the state: checkpoint '
                        'blocks with use_reentrant=False, or by set_grad_checkpointing.'
                    )
        return x

    def advance(self, block: nn.Module, x: torch.Tensor, *state: Optional[torch.Tensor]) -> Tuple[Any, ...]:
        """A block as a function of features, state and kernel, for a checkpoint."""
        step = TimeStep(self.regulator, *state)
        x = block(x, step)
        return x, *step.next


STEMS = ('', 'deep', 'deep_tiered', 'cifar')


class RegulatedResNet(ResNet):
    """ResNet or SE-ResNet with a regulator per stage; without one (`regulator=None`) it is timm's ResNet.

    One class for both stems: timm's for ImageNet, and `stem_type='cifar'`, a 3x3 convolution of the first stage's width
    with no pooling, for 32x32 images.
    """

    if TYPE_CHECKING:
        conv1: Any
        maxpool: Any
        layer1: Any
        layer2: Any
        layer3: Any
        layer4: Any
        feature_info: List[Dict[str, Any]]
        pretrained_cfg: Dict[str, Any]

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
            regulator: 'convrnn', 'convgru' or 'convlstm'; None or 'none' for a ResNet (`timm.create_model` drops
                arguments that are None, so 'none' is the one to give it); 'fuse' for a control of ours, blocks that
                have the fuse convolution over their features, and no memory.
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
        _one_of('regulator', regulator, (*CELLS, 'fuse', 'none', None))
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
        if not all(isinstance(width, int) and width > 0 for width in channels):
            raise ValueError(f'channels must be positive widths; got {tuple(channels)}.')
        check_layers(act_layer, norm_layer, global_pool, kwargs)
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f'in_chans must be at least 1 and num_classes 0; got {in_chans} and {num_classes}.')
        if cifar and (channels[0] % 2 or kwargs.get('replace_stem_pool') or kwargs.get('stem_width')):
            raise ValueError("stem_type='cifar' takes an even channels[0], no replace_stem_pool and no stem_width.")

        blocks = BLOCKS[block]
        chosen = blocks['control' if regulator == 'fuse' else 'regulated']
        if regulator in CELLS:
            chosen = partial(chosen, regulator=regulator, carry=carry, share_regulator=share_regulator)
            chosen.expansion = blocks['plain'].expansion  # type: ignore[attr-defined]  # timm's ResNet reads it
        regulated = [regulator is not None and i + 1 in regulated_stages for i in range(num_stages)]
        if cifar:
            # timm's deep stem has 2 x stem_width channels; its layers are replaced below
            kwargs.update(stem_width=channels[0] // 2)

        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                tuple(chosen if r else blocks['plain'] for r in regulated),  # type: ignore[arg-type]  # one per stage
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
                if r and regulator in CELLS:
                    stage = getattr(self, name)
                    cell = CELLS[regulator](stage[0].state_width) if share_regulator else None
                    setattr(self, name, RegulatedStage(stage, cell))
            for i in range(num_stages, 4):
                setattr(self, f'layer{i + 1}', nn.Sequential())  # timm's ResNet names four
            for name in ('global_pool', 'fc'):  # behind them, where the forward pass has them
                self._modules[name] = self._modules.pop(name)
        sample_first(self)
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

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        link_stem(self)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        """Complete a ResNet's weights, so that whatever loads a state dict can start from them: see warm_start.py."""
        plain = 'layer1.0.conv1.weight' in state_dict and not any('conv_fuse' in name for name in state_dict)
        kinds = (RegulatedBasicBlock, RegulatedBottleneck)
        if plain and not prefix and any(isinstance(m, kinds) for m in self.modules()):
            from .warm_start import checkpoint_filter_fn

            whole = checkpoint_filter_fn(dict(state_dict), self)
            state_dict.clear()
            state_dict.update(whole)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
