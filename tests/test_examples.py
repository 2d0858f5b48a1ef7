"""The notebooks run from top to bottom without a network, and the segmentation example trains."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import environment

nbformat = pytest.importorskip('nbformat', reason='notebooks need nbformat')
nbclient = pytest.importorskip('nbclient', reason='notebooks need nbclient to run')
EXAMPLES = Path(__file__).parent.parent / 'examples'
NOTEBOOKS = sorted(EXAMPLES.glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, hub, tmp_path):
    """Each in a kernel of its own, with the stand-in for the Hub; a cell that raises fails the test."""
    notebook = nbformat.read(path, as_version=4)
    env = environment(hub, HF_HOME=str(tmp_path / 'hf'), TMPDIR=str(tmp_path), OMP_NUM_THREADS='1')
    env.update(HF_TOKEN='hf_right', HF_HUB_DISABLE_XET='1')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get('PYTHONPATH')]))
    before = sorted(EXAMPLES.iterdir())
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': EXAMPLES}}
    )
    client.execute(env=env)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
    assert sorted(EXAMPLES.iterdir()) == before, 'a notebook leaves nothing in the checkout'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith('# ')
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in notebook.cells)


@pytest.fixture(scope='module')
def segmentation():
    spec = importlib.util.spec_from_file_location('segmentation', EXAMPLES / 'segmentation.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def digits():
    """In place of scikit-learn's: a bar each, in another column."""
    images = np.zeros((8, 8, 8), np.float32)
    images[range(8), :, range(8)] = 1
    return images


def test_scenes_are_labelled_where_the_ink_is(segmentation, digits):
    x, y = segmentation.scenes(digits, 32, 8, np.random.default_rng(0))
    again, _ = segmentation.scenes(digits, 32, 8, np.random.default_rng(0))
    assert x.shape == (8, 3, 32, 32) and y.shape == (8, 32, 32) and torch.equal(x, again)
    for scene, target in zip(x, y):
        assert (target == 2).sum() == 2 * 2 * 16 and 0 < (target == 1).sum() < 12 * 2 * 8, 'two bars of 2x16 pixels'
        assert scene[0][target > 0].min() > 0.1 and abs(scene[0][target == 0].mean()) < 0.05


def test_mean_iou_of_what_is_right_and_of_background_alone(segmentation, digits):
    ((_, y),) = segmentation.batches(digits, 32, 1, seed=10**6)
    net = torch.nn.Identity()
    for found, iou in ((y, 100.0), (torch.zeros_like(y), 100 * (y == 0).float().mean().item() / 3)):
        net.forward = lambda x, found=found: torch.nn.functional.one_hot(found, 3).permute(0, 3, 1, 2)
        assert segmentation.mean_iou(net, digits, 32, 16) == pytest.approx(iou, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['regnet_convlstm_20', 'cifar_resnet_20'])
def test_a_segmenter_learns(segmentation, digits, name):
    torch.manual_seed(0)
    model = segmentation.build('features', name)
    x, y = segmentation.scenes(digits, 32, 16, np.random.default_rng(1))
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(x), y)
    segmentation.train(model, digits, 32, updates=8, seed=0)
    with torch.no_grad():
        assert torch.nn.functional.cross_entropy(model(x), y) < 0.8 * before
