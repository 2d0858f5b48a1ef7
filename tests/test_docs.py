"""What README and docs show: Python blocks run, shell blocks are read or run, links lead somewhere, the site builds."""

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
from hub_server import HubServer
from safetensors.torch import save

from timm_regnet_rnn import cli
from timm_regnet_rnn.cli import main

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    flag
    for option in json.loads((ROOT / 'train_recipes' / 'options.json').read_text(encoding='utf-8'))['options'].values()
    for flag in option['flags']
}
RAW = 'https://raw.githubusercontent.com/timm-regnet-rnn/timm_regnet_rnn/main/'
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
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'chelsea.jpg', tmp_path / 'docs')
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


class Parsed(Exception):
    """A program has read its arguments."""


@contextlib.contextmanager
def stops_when_parsed(monkeypatch):
    """In it, what argparse reads with success is raised, so that a program ends before it does anything."""
    parse, depth = argparse.ArgumentParser.parse_known_args, []

    def read(parser, *args, **kwargs):
        depth.append(parser)
        try:
            found = parse(parser, *args, **kwargs)
        finally:
            depth.pop()
        if not depth:
            raise Parsed(*found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_known_args', read)
        yield


def lines(page):
    """The commands of a page's shell blocks, each as its words."""
    for block in blocks(page, 'sh'):
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index('&&') if '&&' in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


EXTRAS = metadata.metadata('timm-regnet-rnn').get_all('Provides-Extra')
SHELL = [words for page in PAGES for words in lines(page)]
SHELL = [words for i, words in enumerate(SHELL) if words not in SHELL[:i]]
TOOLS = ('mkdocs', 'mypy', 'pre-commit', 'ruff')


def reads(monkeypatch, program, *argv):
    """What a program leaves unread of its arguments, after it refused none."""
    known = [word for word in argv if word != '...']
    with stops_when_parsed(monkeypatch), pytest.raises(Parsed) as read:
        program(known)
    namespace, unread = read.value.args
    if getattr(namespace, 'command', '') == 'train':
        unread = [word for word in unread if word.startswith('-') and word not in FLAGS]
    assert unread == [], argv


@pytest.mark.parametrize('words', SHELL, ids=' '.join)
def test_a_shell_line_is_read_by_its_program(words, monkeypatch):
    """Every line of every shell block: its program exists and takes these arguments."""
    monkeypatch.chdir(ROOT)
    program, *argv = words
    if program == 'timm-regnet-rnn':
        reads(monkeypatch, main, *argv)
    elif program == 'python' and argv[0].endswith('.py') and '/' in argv[0]:
        monkeypatch.setattr(sys, 'argv', argv)
        reads(monkeypatch, lambda known: runpy.run_path(known[0], run_name='__main__'), *argv)
    elif program == 'python' and argv[:2] == ['-m', 'timm_regnet_rnn']:
        reads(monkeypatch, main, *argv[2:])
    elif program == 'python' and argv[:2] == ['-m', 'pytest']:
        assert all((ROOT / word).exists() for word in argv[2:] if '/' in word or word == 'tests')
    elif program == 'python' and argv[0] == 'train.py':  # timm's, by hand
        assert {word for word in argv if word.startswith('-')} <= set(FLAGS)
    elif program == 'pip':
        (package,) = [word for word in argv[1:] if not word.startswith('-')]
        name, _, extras = package.rstrip(']').partition('[')
        assert argv[0] == 'install' and name in ('.', 'timm-regnet-rnn')
        assert all(extra in EXTRAS for extra in filter(None, extras.split(',')))
    elif program == 'bash':
        assert (ROOT / argv[0]).is_file()
    elif program in TOOLS:  # installed by an extra
        assert any(re.match(rf'{program}\b.*(dev|docs)', need) for need in metadata.requires('timm-regnet-rnn'))
    else:  # the first steps in an empty environment
        assert words in (['python', '-m', 'venv', '.venv'], ['.', '.venv/bin/activate'])


RUN = ('predict', 'list', 'visualize', 'export')


@pytest.mark.slow
def test_shell_lines_that_need_nothing_run(tmp_path, monkeypatch, capsys):
    """Those that ask for no data, no network and no other machine, for real."""
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'chelsea.jpg', tmp_path / 'docs')
    monkeypatch.chdir(tmp_path)
    chosen = [words[1:] for words in SHELL if words[0] == 'timm-regnet-rnn' and words[1] in RUN]
    chosen = [argv for argv in chosen if 'output/photos' not in argv]  # a run, which the line before trains
    assert {argv[0] for argv in chosen} == {*RUN}
    for argv in chosen:
        assert cli.main(argv) == 0 and capsys.readouterr().out, argv
    assert {'chelsea.html', 'regnet_convlstm_20.onnx'} <= {path.name for path in tmp_path.iterdir()}


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
        ['mkdocs', 'build', '--strict', '-d', str(tmp_path / 'site')],  # with -q it would count no warnings
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 'WARNING' not in done.stderr, done.stderr
    page = (tmp_path / 'site' / 'how_it_works' / 'index.html').read_text(encoding='utf-8')
    assert 'conv_lstm_step' in page and 'torch' in page
    assert page.count('<details class="mkdocstrings-source" open>') >= 8 and not list(tmp_path.rglob('*.py'))
    api = (tmp_path / 'site' / 'api' / 'index.html').read_text(encoding='utf-8')
    for name in re.findall('^::: ([\\w.]+)', (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8'), re.MULTILINE):
        assert f'id="{name}"' in api, name
    for file in sorted((tmp_path / 'site').rglob('*.html')):  # nothing is asked of another machine
        loaded = re.findall(r'<(?:img|script|link)[^>]*?(?:src|href)="?(https?://[^" >]*)', file.read_text('utf-8'))
        assert all(link.startswith(RAW) for link in loaded), (file, loaded)
