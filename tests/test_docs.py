"""What README and docs show: Python blocks run, commands exist, links lead somewhere, the site builds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from hub_server import HubServer
from safetensors.torch import save

from timm_regnet_rnn.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'examples' / 'README.md',
    *sorted((ROOT / 'docs').glob('*.md')),
]


def blocks(page, language):
    """The fenced blocks of a page, in order."""
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def hub():
    """Stands in for the Hub, with the two ResNets that the README names; their weights are random."""
    with HubServer() as server:
        for name, tag in (('resnet50', 'a1_in1k'), ('resnet101d', 'ra2_in1k')):
            weights = save(timm.create_model(name).state_dict())
            server.add_repo(f'timm/{name}.{tag}', {'model.safetensors': weights})
        yield server


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')], ids=lambda page: page.name)
def test_python_blocks_run(page, hub, tmp_path):
    code = 'import torch; torch.set_num_threads(1)\n' + '\n'.join(blocks(page, 'python'))
    if page.name == 'README.md':  # its blocks show, the test asserts
        code += '\nassert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 9'
    else:
        assert all('assert' in block for block in blocks(page, 'python')), 'a block that asserts nothing'
    env = {**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path)}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_exist(capsys):
    """Every command that a shell block or a table names is one, and has the flags that stand behind it."""
    text = '\n'.join(page.read_text(encoding='utf-8') for page in PAGES)
    used = {}
    for line in re.findall(r'timm-regnet-rnn ([a-z].*?)(?:`|$|#)', text, flags=re.MULTILINE):
        words = line.split()
        used.setdefault(words[0], set()).update(w for w in words if re.fullmatch('--[a-z][a-z-]*', w))
    assert {'predict', 'list', 'train', 'export', 'pull', 'autoload'} <= used.keys()
    for command, flags in used.items():
        with pytest.raises(SystemExit) as done:
            main([command, '--help'])
        assert done.value.code == 0, command
        if command != 'train':  # which takes every flag of train.py
            assert flags <= set(re.findall('--[a-z][a-z-]*', capsys.readouterr().out)), command


def test_scripts_exist():
    for page in PAGES:
        for script in re.findall(
            r'(?:python|bash) ((?:hub|train_recipes|benchmarks|examples|\.ci)/[\w./]+)', page.read_text('utf-8')
        ):
            assert (ROOT / script).is_file(), (page.name, script)


def test_relative_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r'\]\((?!https?://|#)([^)#]+)', page.read_text(encoding='utf-8')):
            assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('mkdocs'), reason="needs pip install '.[docs]'")
def test_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        ['mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path / 'site')],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 'WARNING' not in done.stderr, done.stderr
    page = (tmp_path / 'site' / 'how_it_works' / 'index.html').read_text(encoding='utf-8')
    assert 'conv_lstm_step' in page and 'torch' in page
