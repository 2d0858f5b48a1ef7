"""What goes wrong is one line, and a command's exit status."""

import argparse
import contextlib
import difflib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_cli import CAT, NAMES, refused
from timm.utils import ParseKwargs

from timm_regnet_rnn.cli import DEFAULT_MODEL
from timm_regnet_rnn.errors import EXPECTED, KeyValues, Parser, UsageError, did_you_mean, one_line, report, run_command


@pytest.mark.parametrize(
    'argv, meant',
    [
        (['pedict', 'x'], 'predict'),
        (['predict', 'x', '--modell', 'm'], '--model'),
        (['predict', 'x', '--tokp=3'], '--topk'),
        (['export', 'x', '--format', 'safetensor'], 'safetensors'),
        (['list', '--pretraind'], '--pretrained'),
    ],
)
def test_did_you_mean(capsys, argv, meant):
    assert f'Did you mean {meant!r}?' in refused(capsys, *argv)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['predict', 'export'])
def test_ctrl_c_is_one_line(command, tmp_path):
    """Wherever it comes: while PyTorch is imported, and in the middle of the work."""
    for i in range(2000):
        os.link(CAT, tmp_path / f'{i}.jpg') if i else shutil.copy(CAT, tmp_path / '0.jpg')
    argv = dict(
        predict=[str(tmp_path)], export=[DEFAULT_MODEL, '--format', 'onnx', '--output', str(tmp_path / 'a.onnx')]
    )
    for seconds in (1, 9):
        status = 0
        while status == 0:  # a quick machine may be done by then
            child = subprocess.Popen(
                [sys.executable, '-m', 'timm_regnet_rnn', command, *argv[command]],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                # a shell's background jobs ignore it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            time.sleep(seconds)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=300)
            status, seconds = child.returncode, seconds / 2
            (tmp_path / 'a.onnx').unlink(missing_ok=True) if status == 0 else None
        assert status == 130 and err.splitlines() == ['timm-regnet-rnn: stopped.'], err
    assert not (tmp_path / 'a.onnx').exists() and not list(tmp_path.glob('.*'))


DISGUISES = dict(
    itself='os.kill(os.getpid(), signal.SIGINT)',
    inside_exec='exec("os.kill(os.getpid(), signal.SIGINT)")',  # Python would end by the signal at its exit
    another_error="""
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    raise RecursionError('maximum recursion depth exceeded')
""",
    a_fault="""
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    raise LookupError
""",
)


@pytest.mark.parametrize('disguise', DISGUISES)
def test_ctrl_c_is_told_from_what_libraries_make_of_it(disguise):
    code = f'import os, signal, sys\ndef work():\n{textwrap.indent(DISGUISES[disguise], "    ")}'
    code += '\nfrom timm_regnet_rnn.errors import run_command\nsys.exit(run_command("prog", work))'
    child = subprocess.run(
        [sys.executable, '-c', code],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (child.returncode, child.stderr) == (130, 'prog: stopped.\n')


def test_ctrl_c_is_pythons_again_behind_a_command():
    before = signal.getsignal(signal.SIGINT)
    assert run_command('prog', lambda: 0) == 0 and signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor() as pool:  # where no handler can be set
        assert pool.submit(run_command, 'prog', lambda: 3).result() == 3


def test_closed_pipe_is_quiet():
    done = subprocess.run(
        f'"{sys.executable}" -m timm_regnet_rnn list | head -n 1', shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith('model ') and done.stderr == ''


# names that were meant


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_a_name_with_one_letter_wrong_is_found(name, data):
    """Of all models, the one that is nearest to a misspelt name is at least as near as the one that was meant."""
    i = data.draw(st.integers(0, len(name) - 1))
    typo = name[:i] + data.draw(st.sampled_from(['', name[i] * 2, 'x'])) + name[i + 1 :]
    sentence = did_you_mean(typo, NAMES)
    found = sentence.removeprefix(" Did you mean '").removesuffix("'?")
    ratio = {n: difflib.SequenceMatcher(None, n, typo).ratio() for n in (found, name)}
    assert found in NAMES and ratio[found] >= ratio[name] - 1e-9


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=4))
def test_any_hint_is_nothing_or_one_of_the_words(word, words):
    hint = did_you_mean(word, iter(words))
    assert hint in ('', *(f' Did you mean {w!r}?' for w in words))
    assert word not in words or not word or hint == f' Did you mean {word!r}?'


def test_nothing_near_is_no_hint():
    assert did_you_mean('zebra', ['regnet_convlstm_20', '--model']) == '' == did_you_mean('a', [])


# lines


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=2000))
def test_any_error_is_one_line(text):
    line = one_line(ValueError(text))
    assert len(line.splitlines()) == 1 and len(line) <= 500
    first = next((part.strip() for part in text.splitlines() if part.strip()), 'ValueError')
    assert line[:499] == first[:499] or first.endswith(':') or first.startswith('Error(s) in loading state_dict')


@pytest.mark.parametrize(
    'error, line',
    [
        (ValueError('plain'), 'plain'),
        (ValueError('first\nsecond'), 'first'),
        (ValueError('\n\n  first:  \n\n  second  \nthird'), 'first: second'),
        (ValueError('first:'), 'first:'),
        (KeyError(), 'KeyError'),
        (MemoryError(' \n '), 'MemoryError'),
        (ValueError('x' * 500), 'x' * 500),
        (ValueError('x' * 501), 'x' * 499 + '…'),
        (
            RuntimeError('Error(s) in loading state_dict for Net:\n\tMissing key(s): "a".\n\tUnexpected key(s): "b".'),
            'the weights do not fit the model: Missing key(s): "a". (and 1 more)',
        ),
        (
            RuntimeError('Error(s) in loading state_dict for Net:\n\tsize mismatch'),
            'the weights do not fit the model: size mismatch',
        ),
        (
            RuntimeError('Error(s) in loading state_dict for Net:\n' + 'k' * 241),
            'the weights do not fit the model: ' + 'k' * 239 + '…',
        ),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line


# NAME=VALUE


def words_of(action, words):
    parser = argparse.ArgumentParser()
    parser.add_argument('--kwargs', nargs='*', action=action)
    return parser.parse_args(['--kwargs', *words]).kwargs


NAME = st.from_regex(r'[a-z_]{1,8}', fullmatch=True)
VALUE = st.one_of(
    *(st.integers().map(repr), st.floats(allow_nan=False).map(repr), st.booleans().map(repr), NAME, st.just('None')),
    *(st.lists(st.integers()).map(repr), st.tuples(st.integers(), NAME).map(repr), st.just('')),
    *(st.sampled_from(['bicubic', '1e-3', '(1,', '-', 'a.b', '1,2', '{}', "{'a': 1}", 'a b', '[1,2']),),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(NAME, VALUE), max_size=4))
def test_names_and_values_are_timms(pairs):
    words = [f'{name}={value}' for name, value in pairs]
    try:
        timms = words_of(ParseKwargs, words)
    except SyntaxError:  # timm up to 1.0.20 takes fewer
        reject()
    assert words_of(KeyValues, words) == timms


@pytest.mark.parametrize('word', ['a', '=1', 'a=1=2', ''])
def test_what_is_no_name_and_value_is_said(word, capsys):
    with pytest.raises(SystemExit):
        words_of(KeyValues, ['good=1', word])
    assert f'must be NAME=VALUE ..., got {word!r}' in capsys.readouterr().err


@pytest.mark.parametrize('value', ['{[]:1}', '-' * 100_000 + '1', '(' * 100_000])
def test_a_value_that_python_cannot_read_is_said(value, capsys):
    with contextlib.suppress(SystemExit):
        assert words_of(KeyValues, [f'a={value}']) == dict(a=value)
    assert len(capsys.readouterr().err) < 1000


# commands


def test_a_parser_refuses_in_one_line(capsys):
    parser = Parser(prog='tool', examples=['a.jpg --size 3', ''])
    parser.add_argument('--size', type=int, choices=[1, 2])
    parser.add_argument('--mode', choices=['fast', 'slow'])
    assert parser.format_help().endswith('examples:\n  tool a.jpg --size 3\n  tool\n')
    for run, line in (
        (lambda: parser.parse_args(['--mode', 'slwo']), "Did you mean 'slow'? (see tool --help)"),
        (lambda: parser.refuse(['x', '--mod=3']), "unrecognized arguments: x --mod=3. Did you mean '--mode'? (see"),
        (lambda: parser.refuse(['x']), 'tool: unrecognized arguments: x. (see tool --help)'),
    ):
        with pytest.raises(SystemExit) as stop:
            run()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith('tool: ') and err.count('\n') == 1 and line in err, err


@pytest.mark.parametrize(
    'error, status, line',
    [
        (UsageError('say --size'), 2, 'tool: say --size\n'),
        (FileNotFoundError(2, 'No such file or directory', 'x'), 2, "tool: [Errno 2] No such file or directory: 'x'\n"),
        (MemoryError(), 2, 'tool: MemoryError\n'),
        (KeyboardInterrupt(), 130, 'tool: stopped.\n'),
    ],
)
def test_the_status_of_a_command(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv('TIMM_REGNET_RNN_DEBUG', raising=False)

    def fail():
        raise error

    assert run_command('tool', fail) == status and capsys.readouterr().err == line
    monkeypatch.setenv('TIMM_REGNET_RNN_DEBUG', '1')
    assert run_command('tool', fail) == status
    err = capsys.readouterr().err
    assert err.startswith('Traceback') and err.endswith(line) and 'in fail' in err


def test_a_fault_of_the_program_is_raised(capsys):
    assert run_command('tool', lambda: 7) == 7
    assert not {KeyError, AttributeError, AssertionError, ZeroDivisionError} & {*EXPECTED}
    with pytest.raises(ZeroDivisionError):
        run_command('tool', lambda: 1 // 0)
    with pytest.raises(ValueError):
        run_command('tool', lambda: int('x'), expected=(OSError,))
    assert run_command('tool', lambda: int('x'), explain=lambda e: type(e).__name__) == 2
    assert capsys.readouterr().err == 'tool: ValueError\n'


def test_a_command_says_what_the_package_logs(capsys, monkeypatch):
    logger = logging.getLogger('timm_regnet_rnn')
    monkeypatch.setattr(logger, 'level', logging.ERROR)
    before = logger.level, [*logger.handlers]

    def work():
        logging.getLogger('timm_regnet_rnn.deep').info('fetching %d', 3)
        logger.debug('hidden')
        logging.getLogger('other').error('hidden')
        return 0

    assert run_command('tool', work) == 0 and capsys.readouterr().err.splitlines() == ['tool: fetching 3']
    assert (logger.level, logger.handlers) == before


def test_a_line_outside_of_an_error_has_no_traceback(capsys, monkeypatch):
    monkeypatch.setenv('TIMM_REGNET_RNN_DEBUG', '1')
    report('tool', 'hello')
    assert capsys.readouterr().err == 'tool: hello\n'


@given(st.text())
def test_nothing_that_is_said_steers_a_terminal(text):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        report('prog', text)
        with pytest.raises(SystemExit):
            Parser(prog='prog').error(text)
    assert all(c.isprintable() or c in '\n\t' for c in said.getvalue())
    assert text in said.getvalue() or not text.isprintable()


def test_an_error_about_a_long_argument_is_not_long(capsys):
    with pytest.raises(SystemExit):
        Parser(prog='prog').parse_args(['x' * 5000])
    assert len(capsys.readouterr().err.splitlines()[-1]) < 600
    parser = Parser(prog='prog')
    parser.add_argument('--name')
    with pytest.raises(SystemExit):
        parser.refuse(['--nam=1', 'x' * 5000])
    assert "Did you mean '--name'?" in capsys.readouterr().err, 'what helps is kept'
