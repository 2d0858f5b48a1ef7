"""The notebooks run from top to bottom without a network, and the segmentation example trains."""

import importlib.util
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hub_server import environment
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / 'examples'
NOTEBOOKS = sorted(EXAMPLES.glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, hub, tmp_path):
    """Each in a kernel of its own, with the stand-in for the Hub; a cell that raises fails the test."""
    notebook = nbformat.read(path, as_version=4)
    env = environment(hub, HF_HOME=str(tmp_path / 'hf'), TMPDIR=str(tmp_path), OMP_NUM_THREADS='1')
    env['HF_TOKEN'] = 'hf_right'
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get('PYTHONPATH')]))
    before = sorted(EXAMPLES.iterdir())
    client = NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': EXAMPLES}})
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
    """In place of scikit-learn's: a bar that stands in another column for each of ten classes."""
    images = np.zeros((20, 8, 8), np.float32)
    labels = np.arange(20) % 10
    for image, label in zip(images, labels):
        image[:, label % 8] = 1
    return images, labels


def test_scenes_are_labelled_where_the_ink_is(segmentation, digits):
    x, y = segmentation.scenes(digits, 32, 8, np.random.default_rng(0))
    again, _ = segmentation.scenes(digits, 32, 8, np.random.default_rng(0))
    assert x.shape == (8, 3, 32, 32) and y.shape == (8, 32, 32) and torch.equal(x, again)
    for scene, target in zip(x, y):
        classes = target.unique()
        assert classes[0] == 0 and 2 <= len(classes) <= 3 and classes.max() <= 10  # background and two digits
        assert scene[0][target > 0].mean() > scene[0][target == 0].mean() + 0.3
    perfect = lambda x: torch.nn.functional.one_hot(y_of[x.shape[0]], 11).permute(0, 3, 1, 2)  # noqa: E731
    batches = list(segmentation.batches(digits, 32, 1, seed=10**6))
    y_of = {16: batches[0][1]}
    net = torch.nn.Identity()
    net.forward = perfect
    assert segmentation.mean_iou(net, digits, 32, 16) == pytest.approx(100)


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
        assert torch.nn.functional.cross_entropy(model(x), y) < before / 2
