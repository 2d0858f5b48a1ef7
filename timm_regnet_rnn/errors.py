"""What goes wrong, and how the commands say it: one line, and the traceback with TIMM_REGNET_RNN_DEBUG=1.

The library raises whole messages; only a command shortens them. What takes long (a compile, a retry, a fetch) is said
through `logging` under the name `timm_regnet_rnn`.
"""

import argparse
import os
import sys
import traceback
from typing import Callable, NoReturn, Tuple, Type

__all__ = ['EXPECTED', 'Parser', 'UsageError', 'one_line', 'report', 'run_command']


class UsageError(ValueError):
    """Bad input: a command prints it as one line and ends with status 2."""


# What a command's input, its files or its network can cause; anything else is a fault of the program.
EXPECTED: Tuple[Type[BaseException], ...] = (ValueError, TypeError, RuntimeError, OSError, MemoryError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end the process with status 2."""
        self.exit(2, f'{self.prog}: {message} (see {self.prog} --help)\n')


def one_line(error: BaseException) -> str:
    """An error's first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def report(prog: str, message: str) -> None:
    """Print one line on stderr, behind the traceback of the error being handled if debugging is on."""
    if os.environ.get('TIMM_REGNET_RNN_DEBUG') == '1' and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f'{prog}: {message}', file=sys.stderr)


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
    try:
        return function()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        report(prog, 'stopped.')
        return 130
    except expected as e:
        report(prog, explain(e))
        return 2
