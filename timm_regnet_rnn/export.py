"""A model in one file for deployment: ONNX, a torch.export program, or its plain weights.

The file is written beside its final name, loaded again and compared with the eager model; only then it gets the name.
"""

import importlib.util
import io
import json
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save
from timm.data import resolve_data_config
from timm.models import is_model, is_model_in_modules
from timm.utils import reparameterize_model

from . import __version__, ops
from .errors import UsageError
from .files import place
from .inference import Model, class_names, create

__all__ = ['FORMATS', 'export']

FORMATS = {'onnx': '.onnx', 'torch-export': '.pt2', 'safetensors': '.safetensors'}  # and how their files end
TOLERANCE = 1e-4  # largest difference of logits, relative to their scale
ONNX_LIMIT = 2**31 - 1  # bytes in one protobuf message


def _describe(model: Model, checkpoint: Optional[str], image_size: Optional[int]) -> Dict[str, Any]:
    """What the user of a file needs to know: the model, its input and, where known, its classes."""
    cfg = model.pretrained_cfg
    tag = None if checkpoint else cfg.get('tag')
    data = resolve_data_config(model=model, use_test_size=True)
    height, width = (image_size, image_size) if image_size else data['input_size'][1:]
    about = dict(
        model='.'.join(filter(None, (cfg['architecture'], tag))),
        timm_regnet_rnn=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        input_size=(model.in_chans, height, width),
        interpolation=data['interpolation'],
        crop_pct=data['crop_pct'],
        crop_mode=data['crop_mode'],
    )
    for key in ('mean', 'std'):  # one per channel; else the average, as timm saves it
        values = data[key]
        about[key] = values if len(values) == model.in_chans else (sum(values) / len(values),) * model.in_chans
    names = class_names(model)
    if names and names[0] != 'class 0':  # numbers say nothing
        about.update(label_names=names)
    if getattr(model, 'model_args', None):
        about.update(model_args=model.model_args)
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}


def _pad_pools(graph: Any) -> None:
    """Let average pools that round up say their padding instead, in place: the same windows.

    ONNX Runtime keeps its blocked layout only through pools that do not round up, and transposes around the others.
    """
    from onnx import helper

    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    for node in graph.node:
        if node.op_type != 'AveragePool':
            continue
        args = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        shape = shapes.get(node.input[0], [])[2:]
        plain = not any(args.get('pads', ())) and set(args.get('dilations', ())) <= {1}
        if not (args.pop('ceil_mode', 0) and plain and shape and all(shape)):
            continue
        over = []  # what the last window lacks; where it would lie outside altogether, there is none
        for size, kernel, stride in zip(shape, args['kernel_shape'], args.get('strides', [1] * len(shape))):
            lack = -(size - kernel) % stride
            over.append(lack if lack < kernel else 0)
        args.update(pads=[0] * len(over) + over, count_include_pad=0)
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(args.items()))


def _to_onnx(net: nn.Module, x: torch.Tensor, batch: Optional[torch.export.Dim], about: Dict[str, str]) -> bytes:
    import onnx

    if sum(t.numel() * t.element_size() for t in net.state_dict().values()) > ONNX_LIMIT:
        raise ValueError('an ONNX file holds at most 2 GB, and this model is larger; torch-export takes it.')
    program: Any = torch.onnx.export(
        net,
        (x,),
        dynamo=True,
        verbose=False,
        input_names=['image'],
        output_names=['logits'],
        dynamic_shapes=({0: batch},) if batch else None,
    )
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info):
        part.ClearField('metadata_props')  # stack traces, with the paths of this machine
    _pad_pools(proto.graph)
    onnx.helper.set_model_props(proto, about)
    return proto.SerializeToString()


def _from_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def _to_program(net: nn.Module, x: torch.Tensor, batch: Optional[torch.export.Dim], about: Dict[str, str]) -> bytes:
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},) if batch else None)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # it has the paths of this machine
    out = io.BytesIO()
    torch.export.save(program, out, extra_files={'about.json': json.dumps(about)})
    return out.getvalue()


def _from_program(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


def _compare(net: Callable, model: nn.Module, size: Tuple[int, ...], batches: Tuple[int, ...]) -> float:
    """The largest difference of logits relative to their scale, over random images (C, H, W) in batches.

    Raises:
        RuntimeError: It is beyond the tolerance, or no number.
    """
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in batches:
        x = torch.randn(batch, *size, generator=random)
        expected, got = model(x), net(x)
        if got.shape != expected.shape:
            raise RuntimeError(f'the export gives {tuple(got.shape)}, the model {tuple(expected.shape)}.')
        error = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE:
            raise RuntimeError(
                f'the export is not the model: logits for a batch of {batch} differ by {error:.1e} of their scale, '
                f'allowed are {TOLERANCE:.0e}.'
            )
        worst = max(worst, error)
    return worst


def _compare_weights(file: Path, state: Dict[str, torch.Tensor]) -> float:
    with safe_open(file, framework='pt') as f:
        if set(f.keys()) != set(state) or not all(torch.equal(f.get_tensor(k), v) for k, v in state.items()):
            raise RuntimeError(f'{str(file)!r} reads otherwise than it was written.')
    return 0.0


def _stem(name: str) -> str:
    """How a file of a model is called: as the model, or as the run whose checkpoint it is."""
    path = Path(name.partition(':')[2] or name).resolve()
    if path.is_file():
        return path.parent.name if path.name.endswith('.tar') else path.stem
    return path.name


def export(
    name: str,
    file: Optional[Union[str, Path]],
    format: str,
    checkpoint: Optional[str] = None,
    image_size: Optional[int] = None,
    batch_size: Optional[int] = None,
    reparameterize: Optional[bool] = None,
    ema: Optional[bool] = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Tuple[Path, float]:
    """Write a model to a file and compare what that holds with the eager model.

    ONNX (one file, input `image`, output `logits`) and torch.export programs hold the deployed model: its batch norms
    folded into its convolutions, and each regulator's two convolutions into one. Safetensors files hold the state dict,
    which `predict --checkpoint` reads. All say which model they are, how its input is made and, where that is known,
    what its classes are: ONNX in `metadata_props`, programs in an extra file `about.json`, safetensors in the header.

    Args:
        name: What names a model of this package, as for `inference.create`.
        file: Where to write; None for NAME, or that of the run, and the format's ending in the current folder.
        format: 'onnx', 'torch-export' or 'safetensors'.
        checkpoint: Weights to take instead of the pretrained ones.
        image_size: Height and width of the input; the model's test size if None.
        batch_size: A fixed batch size; any if None.
        reparameterize: False to export the model as it was trained; True if None.
        ema: Which of a run's two sets of weights, as for `inference.create`.
        progress: Is told what begins, in a few words.

    Returns:
        The file, and the largest difference to the eager model's logits relative to their scale.

    Raises:
        UsageError: A bad argument, or no such model or weights.
        ValueError: The weights are not finite, or cannot be loaded.
        RuntimeError: A package is missing, or the export computes something else than the model. Nothing is written.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    if format not in FORMATS:
        raise UsageError(f'format must be one of {", ".join(FORMATS)}; got {format!r}.')
    if format == 'safetensors' and (image_size, batch_size, reparameterize) != (None, None, None):
        raise UsageError('safetensors are the weights alone: no image size, batch size or reparameterization.')
    for what, value in (('image', image_size), ('batch', batch_size)):
        if value is not None and value < 1:
            raise UsageError(f'{what} size must be at least 1, got {value}.')
    ending = FORMATS[format]
    file = Path(file if file is not None else _stem(name) + ending)
    if file.suffix != ending:
        raise UsageError(f'a {format} file must end in {ending}, got {str(file)!r}.')
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f'{str(file)!r} is a folder.' if file.is_dir() else f'no folder {str(file.parent)!r}.')
    if is_model(name) and not is_model_in_modules(name, ['regnet_rnn']):
        raise UsageError(f'{name!r} is no model of this package; `timm-regnet-rnn list` prints the names.')
    needed = ('onnx', 'onnxscript', 'onnxruntime') if format == 'onnx' else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeError(f"ONNX needs {', '.join(missing)}: pip install 'timm-regnet-rnn[export]'")

    with ops.use('reference'), torch.no_grad():  # an exported graph must run where this package is not
        progress('reading the weights')
        model = create(name, checkpoint, ema)
        architecture = model.pretrained_cfg['architecture']
        if not is_model_in_modules(architecture, ['regnet_rnn']):
            raise UsageError(f'{architecture!r} is no model of this package; `timm-regnet-rnn list` prints the names.')
        state = model.state_dict()
        broken = next((k for k, v in state.items() if not v.isfinite().all()), None)
        if broken:
            raise ValueError(f'the weights are not finite: {broken!r} holds NaN or infinity.')
        about = _describe(model, checkpoint, image_size)
        if format == 'safetensors':
            data = save({k: v.contiguous() for k, v in state.items()}, metadata=dict(about, format='pt'))
            return file, place(file, data, lambda scratch: _compare_weights(scratch, state))
        size = tuple(json.loads(about['input_size']))
        net = model if reparameterize is False else reparameterize_model(model)
        to, read = (_to_onnx, _from_onnx) if format == 'onnx' else (_to_program, _from_program)
        batch = None if batch_size else torch.export.Dim('batch', min=1)
        progress(f'converting {about["model"]} to {format}')
        data = to(net, torch.zeros(batch_size or 2, *size), batch, about)
        progress(f'checking {file.name}')
        batches = (batch_size,) if batch_size else (1, 3)  # neither is the batch of the export
        return file, place(file, data, lambda scratch: _compare(read(scratch), model, size, batches))
