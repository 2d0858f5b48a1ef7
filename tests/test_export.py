"""Exported files, read by what will read them: ONNX Runtime, PyTorch without this package, `predict`."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import randomize, scaled_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import CAT, call, refused

import timm_regnet_rnn.export
from timm_regnet_rnn import ops
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.export import export

pytestmark = pytest.mark.slow

EMBEDDED = 'regnet_convlstm_20'
PLAIN_TORCH = """
import json, sys, torch
extra = {'about.json': ''}
net = torch.export.load(sys.argv[1], extra_files=extra).module()
torch.save([net(torch.load(f)) for f in sys.argv[3:]], sys.argv[2])
assert not {'timm', 'timm_regnet_rnn'} & set(sys.modules)
print(extra['about.json'])
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    ops.set_ops('')


def weights(name, file='weights.safetensors', **kwargs):
    """A weights file that no test passes with by chance, and its model."""
    model = randomize(timm.create_model(name, **kwargs)).eval()
    save_file(model.state_dict(), file)
    return model, file


def folder(architecture='seregnet_convgru_20', **kwargs):
    """A folder as timm's save_for_hf writes it, of a small model unlike the registered one."""
    args = dict(dict(layers=(1, 2, 1), num_classes=4, in_chans=1), **kwargs)
    model = randomize(timm.create_model(architecture, **args)).eval()
    timm.models.save_for_hf(model, 'deployed', model_args=args, safe_serialization=True)
    return model, 'local-dir:deployed'


def logits(model, *size):
    x = torch.randn(size)
    with torch.no_grad():
        return x, model(x)


def run_onnx(file, x):
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def run_plain_torch(file, *inputs):
    """What a program computes in a process without timm and this package, and what it says of itself."""
    names = [f'input{i}.pt' for i in range(len(inputs))]
    for x, name in zip(inputs, names):
        torch.save(x, name)
    done = subprocess.run(
        [sys.executable, '-c', PLAIN_TORCH, file, 'outputs.pt', *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load('outputs.pt'), json.loads(done.stdout)


def properties(file):
    return {p.key: p.value for p in onnx.load(file).metadata_props}


def cifar_model(cell):
    """A model for 32x32 images, its name and its weights: those in the package, or a file, for speed a short net's."""
    if cell == 'convlstm':
        return timm.create_model(EMBEDDED, pretrained=True).eval(), EMBEDDED, None
    args = dict(layers=(1, 1, 1), num_classes=10, in_chans=3)
    _, name = folder(f'regnet_{cell}_20', **args)  # with other weights
    return *weights(f'regnet_{cell}_20', **args)[:1], name, 'weights.safetensors'


@pytest.mark.parametrize('cell', CELLS)
def test_onnx(cell):
    model, name, checkpoint = cifar_model(cell)
    before = set(os.listdir())
    file, difference = export(name, None, 'onnx', checkpoint)
    assert file == Path('deployed.onnx' if checkpoint else f'{EMBEDDED}.onnx')
    assert set(os.listdir()) - before == {file.name}  # no weights beside it
    assert 0 <= difference < 1e-5
    for batch in (1, 2, 5):
        x, expected = logits(model, batch, 3, 32, 32)
        assert scaled_error(run_onnx(file, x), expected) < 1e-5
    proto = onnx.load(file)
    assert [i.name for i in proto.graph.input] == ['image'] and [o.name for o in proto.graph.output] == ['logits']
    assert [node.op_type for node in proto.graph.node].count('BatchNormalization') == (
        3 if checkpoint else 9
    )  # the states'
    assert {node.domain for node in proto.graph.node} == {''}
    assert os.fsencode(Path(torch.__file__).parent.parent) not in file.read_bytes()
    about, cfg = properties(file), model.pretrained_cfg
    assert about['model'] == (f'regnet_{cell}_20' if checkpoint else f'{EMBEDDED}.{cfg["tag"]}')
    assert json.loads(about['label_names']) == list(cfg['label_names'])
    assert json.loads(about['input_size']) == [3, 32, 32] and about['interpolation'] == cfg['interpolation']
    assert json.loads(about['mean']) == list(cfg['mean']) and json.loads(about['std']) == list(cfg['std'])
    assert json.loads(about['crop_pct']) == cfg['crop_pct']


def test_the_step_stays_in_the_engines_layout():
    """No zero that is multiplied, no pool that rounds up: ONNX Runtime leaves its blocked layout at the end alone."""
    model, name = folder('regnet_convlstm_50', layers=(2, 1, 1, 1), num_classes=4, in_chans=3)
    file, _ = export(name, None, 'onnx', image_size=64)
    nodes = onnx.load(file).graph.node
    assert not {'Expand', 'ConstantOfShape', 'Split', 'Concat', 'Transpose'} & {node.op_type for node in nodes}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = 'fast.onnx', 3
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    x, expected = logits(model, 3, 3, 64, 64)
    assert scaled_error(torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), expected) < 1e-5
    left = [node.op_type for node in onnx.load('fast.onnx').graph.node]
    assert left.count('ReorderOutput') <= 1 and left.count('ReorderInput') == 0


@pytest.mark.parametrize(
    'kernel,stride,size,over',
    [
        (2, 2, (6, 8), (0, 0)),
        (2, 2, (5, 6), (1, 0)),
        (3, 2, (7, 8), (0, 1)),
        (3, 3, (8, 7), (1, 2)),
        (2, 3, (9, 10), (0, 1)),  # behind the last whole window nine leave no pixel that one would start at
    ],
)
def test_pools_say_their_padding(kernel, stride, size, over):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.AvgPool2d(kernel, stride, ceil_mode=True), torch.nn.AvgPool2d(2, 1)
    ).eval()
    x, expected = logits(net, 2, 3, *size)
    data = timm_regnet_rnn.export._to_onnx(net, x, torch.export.Dim('batch'), {})
    pool, plain = (node for node in onnx.load_from_string(data).graph.node if node.op_type == 'AveragePool')
    args = {a.name: onnx.helper.get_attribute_value(a) for a in pool.attribute}
    assert args['pads'] == [0, 0, *over] and args['count_include_pad'] == 0 and 'ceil_mode' not in args
    assert 0 in [a.i for a in plain.attribute if a.name == 'ceil_mode'], 'as it was'
    Path('pools.onnx').write_bytes(data)
    assert scaled_error(run_onnx('pools.onnx', x), expected) < 1e-6


@pytest.mark.parametrize('cell', CELLS)
def test_torch_export(cell):
    """The program with weights at hand is run where neither timm nor this package is imported."""
    model, name, checkpoint = cifar_model(cell)
    x, expected = zip(*(logits(model, batch, 3, 32, 32) for batch in (1, 2, 5)))
    ops.set_ops('fused')  # would be in the graph
    file, difference = export(name, 'net.pt2', 'torch-export', checkpoint)
    assert ops._ops == 'fused' and 0 <= difference < 1e-4
    if checkpoint:
        program = torch.export.load(file)
        assert not any('timm_regnet_rnn' in str(node.target) for node in program.graph.nodes)
        assert 'layer1.regulator.weight' in program.state_dict and 'bn1.weight' not in program.state_dict
        net = program.module()
        with torch.no_grad():
            assert all(scaled_error(net(a), b) < 1e-4 for a, b in zip(x, expected))
        return
    got, about = run_plain_torch(file, *x)
    assert all(scaled_error(a, b) < 1e-4 for a, b in zip(got, expected))
    assert json.loads(about['input_size']) == [3, 32, 32] and 'label_names' in about
    assert os.fsencode(Path(torch.__file__).parent.parent) not in file.read_bytes()


@pytest.mark.parametrize('cell', CELLS)
def test_safetensors_predict_as_before(cell, capsys):
    name, checkpoint = f'regnet_{cell}_20', None
    model = timm.create_model(EMBEDDED, pretrained=True)
    if name != EMBEDDED:
        model, checkpoint = weights(name)
    option = ['--checkpoint', checkpoint] if checkpoint else []
    status, out, err = call(capsys, 'export', name, '--format', 'safetensors', *option)
    file = Path(f'{name}.safetensors')
    assert status == 0 and err == '' and out.startswith(f'{file}: ') and 'bit for bit' in out
    read = load_file(file)
    assert set(read) == set(model.state_dict())
    assert all(torch.equal(read[k], v) for k, v in model.state_dict().items())
    with safe_open(file, 'pt') as f:
        about = f.metadata()
    assert about['format'] == 'pt' and about['model'].split('.')[0] == name and about['timm'] == timm.__version__
    rows = [
        call(capsys, 'predict', CAT, '--model', name, '--json', *(['--checkpoint', c] if c else []))[1]
        for c in (checkpoint, file)
    ]
    assert rows[0] == rows[1] != ''


def test_a_model_for_224_with_an_odd_size_and_a_fixed_batch():
    model, checkpoint = weights('regnet_convrnn_18')
    file, _ = export('regnet_convrnn_18', 'net.onnx', 'onnx', checkpoint, image_size=161, batch_size=3)
    x, expected = logits(model, 3, 3, 161, 161)
    assert scaled_error(run_onnx(file, x), expected) < 1e-4
    shape = onnx.load(file).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 3, 161, 161]
    about = properties(file)
    assert about['model'] == 'regnet_convrnn_18' and json.loads(about['input_size']) == [3, 161, 161]
    assert json.loads(about['label_names'])[0].startswith('tench')
    file, _ = export('regnet_convrnn_18', None, 'safetensors', checkpoint)
    with safe_open(file, 'pt') as f:
        assert json.loads(f.metadata()['input_size']) == list(model.pretrained_cfg['test_input_size'])


def test_a_folder_with_other_channels_and_classes(capsys):
    model, name = folder()
    status, out, err = call(capsys, 'export', name, '--format', 'onnx', '--image-size', 37, '--batch-size', 'dynamic')
    assert status == 0 and err == '' and out.startswith('deployed.onnx: ') and 'within' in out
    x, expected = logits(model, 3, 1, 37, 37)
    assert scaled_error(run_onnx('deployed.onnx', x), expected) < 1e-4 and expected.shape == (3, 4)
    about = properties('deployed.onnx')
    assert json.loads(about['input_size']) == [1, 37, 37] and 'label_names' not in about  # whose would be ten
    mean = model.pretrained_cfg['mean']
    assert json.loads(about['mean']) == pytest.approx([sum(mean) / 3])

    file, _ = export(name, 'net.pt2', 'torch-export', image_size=37, reparameterize=False)
    program = torch.export.load(file)
    assert set(program.state_dict) == set(model.state_dict())
    with torch.no_grad():
        assert scaled_error(program.module()(x), expected) < 1e-4

    other = randomize(timm.create_model('seregnet_convgru_20', layers=(1, 2, 1), num_classes=4, in_chans=1))
    save_file(other.state_dict(), 'other.safetensors')
    for net, checkpoint in ((model, None), (other, 'other.safetensors')):
        file, _ = export(name, None, 'safetensors', checkpoint)
        assert all(torch.equal(v, load_file(file)[k]) for k, v in net.state_dict().items())


def test_a_mismatch_is_refused(capsys):
    """Eager, the norm's large mean swallows the digits of what it is subtracted from; folded, it cancels before."""
    model, name = folder('regnet_convlstm_20')
    norm = model.layer1[0].bn1
    with torch.no_grad():
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.running_mean.fill_(1e7)
        norm.bias.fill_(1e7)
    save_file(model.state_dict(), 'cancels.safetensors')
    Path('net.pt2').write_text('older')
    before = sorted(os.listdir())
    ops.set_ops('reference')
    command = ('export', name, '--format', 'torch-export', '--output', 'net.pt2', '--checkpoint', 'cancels.safetensors')
    words = refused(capsys, *command)
    assert 'the export is not the model' in words and 'of their scale, allowed are 1e-04' in words
    assert sorted(os.listdir()) == before and Path('net.pt2').read_text() == 'older' and ops._ops == 'reference'
    assert call(capsys, *command, '--no-reparameterize')[0] == 0
    assert sorted(os.listdir()) == before and torch.export.load('net.pt2')


def test_logits_that_are_no_numbers_are_refused(capsys):
    model, name = folder()
    with torch.no_grad():
        model.fc.weight.fill_(3e38)
    save_file(model.state_dict(), 'overflows.safetensors')
    words = refused(capsys, 'export', name, '--format', 'torch-export', '--checkpoint', 'overflows.safetensors')
    assert 'differ by nan' in words and not Path('deployed.pt2').exists()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    save_file(model.state_dict(), 'nan.safetensors')
    for format in timm_regnet_rnn.export.FORMATS:
        words = refused(capsys, 'export', name, '--format', format, '--checkpoint', 'nan.safetensors')
        assert "the weights are not finite: 'fc.weight' holds NaN" in words


@pytest.mark.parametrize('format', ['torch-export', 'safetensors'])
def test_a_full_disk_leaves_the_older_file(format, capsys):
    _, name = folder()
    file = Path(f'deployed{timm_regnet_rnn.export.FORMATS[format]}')
    file.write_text('older')
    before = {path: path.stat().st_size for path in Path().rglob('*')}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        words = refused(capsys, 'export', name, '--format', format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write '{file}' (File too large)" in words
    assert {path: path.stat().st_size for path in Path().rglob('*')} == before and file.read_text() == 'older'


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
def test_without_the_packages_for_onnx(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # Python's way to forbid an import
    words = refused(capsys, 'export', EMBEDDED, '--format', 'onnx')
    assert words.endswith(f"ONNX needs {package}: pip install 'timm-regnet-rnn[export]'\n")
    assert call(capsys, 'export', EMBEDDED, '--format', 'safetensors')[0] == 0


def test_too_large_for_onnx(capsys, monkeypatch):
    monkeypatch.setattr(timm_regnet_rnn.export, 'ONNX_LIMIT', 10_000)
    _, name = folder()
    assert 'at most 2 GB' in refused(capsys, 'export', name, '--format', 'onnx')
    assert os.listdir() == ['deployed']


def test_refuses(capsys, tmp_path):
    def no(*argv):
        words = refused(capsys, 'export', *argv)
        assert not list(Path().glob('*.onnx')) and not list(Path().glob('.*'))
        return words

    onnx_format = ('--format', 'onnx')
    assert 'required: --format' in no(EMBEDDED)
    assert "invalid choice: 'tflite'" in no(EMBEDDED, '--format', 'tflite')
    assert "unknown model 'regnet_convlstm_21'" in no('regnet_convlstm_21', *onnx_format)
    assert "'resnet18' is no model of this package" in no('resnet18', *onnx_format)
    assert 'no pretrained weights' in no('regnet_convlstm_110', *onnx_format)
    assert 'no weights file' in no(EMBEDDED, *onnx_format, '--checkpoint', 'none.safetensors')
    assert "must end in .onnx, got 'net.pt2'" in no(EMBEDDED, *onnx_format, '--output', 'net.pt2')
    assert "no folder 'none'" in no(EMBEDDED, *onnx_format, '--output', 'none/net.onnx')
    assert 'image size must be at least 1, got 0' in no(EMBEDDED, *onnx_format, '--image-size', 0)
    assert 'batch size must be at least 1, got -2' in no(EMBEDDED, *onnx_format, '--batch-size', -2)
    assert "invalid batch_size value: 'many'" in no(EMBEDDED, *onnx_format, '--batch-size', 'many')
    for option in (('--image-size', 32), ('--batch-size', 1), ('--no-reparameterize',)):
        assert 'the weights alone' in no(EMBEDDED, '--format', 'safetensors', *option)
    assert "'none/config.json': no such file" in no('local-dir:none', *onnx_format)
    Path('empty').mkdir()
    Path('empty/config.json').write_text('{}')
    assert 'architecture must be a model of timm_regnet_rnn' in no('local-dir:empty', *onnx_format)
    assert 'not in the cache, and HF_HUB_OFFLINE forbids' in no('hf-hub:timm-regnet-rnn/none', *onnx_format)
    Path('broken.safetensors').write_bytes(b'no')
    assert 'not a safetensors file' in no(EMBEDDED, *onnx_format, '--checkpoint', 'broken.safetensors')
    Path('a.onnx').mkdir()
    assert "'a.onnx' is a folder" in refused(capsys, 'export', EMBEDDED, *onnx_format, '--output', 'a.onnx')
    with pytest.raises(timm_regnet_rnn.cli.UsageError, match="one of onnx, torch-export, safetensors; got 'tflite'"):
        export(EMBEDDED, None, 'tflite')
