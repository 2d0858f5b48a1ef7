"""What goes wrong, and how the commands say it: one line, and the traceback with TIMM_REGNET_RNN_DEBUG=1.

The library raises whole messages; only a command shortens them. What takes long (a compile, a retry, a fetch) is said
through `logging` under the name `timm_regnet_rnn`.
"""

import argparse
import ast
import difflib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NoReturn, Sequence, Tuple, Type

__all__ = ['EXPECTED', 'KeyValues', 'Parser', 'UsageError', 'did_you_mean', 'one_line', 'report', 'run_command']


class UsageError(ValueError):
    """Bad input: a command prints it as one line and ends with status 2."""


# What a command's input, its files or its network can cause; anything else is a fault of the program.
EXPECTED: Tuple[Type[BaseException], ...] = (ValueError, TypeError, RuntimeError, OSError, MemoryError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line.

    Args:
        *args, **kwargs: As in argparse.
        examples: Arguments of commands to show below the options.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if examples:
            self.epilog = '\n'.join(['examples:', *(f'  {self.prog} {example}'.rstrip() for example in examples)])
            self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        """Print the error, with the choice that may have been meant, and end the process with status 2."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            hint = did_you_mean(choice[1], re.findall(r'[\w-]+', choice[2]))
            message = f'{_cut(message, 400)}.{hint}'
        self.exit(2, f'{self.prog}: {_printable(_cut(message, 500))} (see {self.prog} --help)\n')

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End the process for words that are none of this parser's arguments."""
        flag = next((word.split('=')[0] for word in words if word.startswith('-')), '')
        hint = did_you_mean(flag, self._option_string_actions)
        self.error(f'unrecognized arguments: {_cut(" ".join(words))}.{hint}')


class KeyValues(argparse.Action):
    """NAME=VALUE words as a dict, values as Python reads them where it does: timm's ParseKwargs, but for its errors."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Keep the dict."""
        found: Dict[str, Any] = {}
        for word in values:
            name, *rest = word.split('=')
            if not name or len(rest) != 1:
                raise argparse.ArgumentError(self, f'must be NAME=VALUE ..., got {word!r}')
            try:
                found[name] = ast.literal_eval(rest[0])
            except (SyntaxError, ValueError):
                found[name] = rest[0]
            except (MemoryError, RecursionError, TypeError):
                raise argparse.ArgumentError(self, f'cannot read the value of {name}: {_cut(rest[0], 60)}') from None
        setattr(namespace, self.dest, found)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A sentence, with the space before it, on the nearest of the words; empty if none is near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f' Did you mean {close[0]!r}?' if close else ''


def one_line(error: BaseException) -> str:
    """An error's first line, with the second where the first ends in a colon; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0]
    if len(lines) > 1 and line.startswith('Error(s) in loading state_dict'):
        more = f' (and {len(lines) - 2} more)' if len(lines) > 2 else ''
        line = f'the weights do not fit the model: {_cut(lines[1])}{more}'
    elif len(lines) > 1 and line.endswith(':'):
        line = f'{line} {lines[1]}'
    return _cut(line, 500)


def _cut(text: str, length: int = 240) -> str:
    """The text, its end left out where it is longer than `length` characters."""
    return text if len(text) <= length else f'{text[: length - 1]}…'


def _printable(text: str) -> str:
    """The text with what would steer a terminal, as a broken file may hold, written as Python writes it."""
    return ''.join(c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text)


def report(prog: str, message: str) -> None:
    """Print one line on stderr, behind the traceback of the error being handled if debugging is on."""
    if os.environ.get('TIMM_REGNET_RNN_DEBUG') == '1' and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f'{prog}: {_printable(message)}', file=sys.stderr)


class _Lines(logging.Handler):
    """Log records as the lines of a command."""

    def __init__(self, prog: str) -> None:
        super().__init__(logging.INFO)
        self.prog = prog

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message."""
        report(self.prog, record.getMessage())


@contextmanager
def _logged(prog: str) -> Iterator[None]:
    """Print what this package logs."""
    logger, handler = logging.getLogger('timm_regnet_rnn'), _Lines(prog)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C: a class of its own, because Python dies at its exit of a KeyboardInterrupt that has passed an `exec`."""


@contextmanager
def _interruptible() -> Iterator[List[int]]:
    """Raise _Interrupted at Ctrl-C, and list its signals: a library may have made another error of it, or none."""
    seen: List[int] = []

    def interrupt(number: int, _: Any) -> NoReturn:
        seen.append(number)
        raise _Interrupted

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(
    prog: str,
    function: Callable[[], int],
    explain: Callable[[BaseException], str] = one_line,
    expected: Tuple[Type[BaseException], ...] = EXPECTED,
) -> int:
    """Run a command's function.

    Args:
        prog: The command's name, which begins the line of an error.
        function: Returns the exit status.
        explain: Makes the line of an error.
        expected: The errors to say in one line; others are raised.

    Returns:
        The exit status: the function's, 2 after an error, 130 after Ctrl-C, 0 where the reader of a pipe has gone.
    """
    with _interruptible() as interrupts:
        try:
            with _logged(prog):
                status = function()
                sys.stdout.flush()  # or a reader that has gone is noticed by Python alone, when it exits
                return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as e:
            if interrupts or isinstance(e, KeyboardInterrupt):
                report(prog, 'stopped.')
                return 130
            if not isinstance(e, expected):
                raise
            report(prog, explain(e))
            return 2
