"""How fused_cpu.cpp is compiled: by hatch_build.py into the wheel, by fused_cpu.py where no wheel brought it.

The standard library alone, because a build has nothing else. A library's name holds a sum of the source and the flags,
so that one of another version is never found; beside it stands the sum of its own bytes.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

__all__ = ['WHEEL_LEVELS', 'compile_library', 'find_compiler', 'library_name', 'sum_file']

SOURCE = Path(__file__).with_name('fused_cpu.cpp')
FLAGS = ['-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-fno-exceptions', '-fPIC', '-Wno-psabi']
# By torch.backends.cpu.get_cpu_capability(): what it has found out about the CPU, no more (x86-64-v4 and -v3 would be).
CPU_FLAGS = {
    'AVX512': ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mavx2', '-mfma'],
    'AVX2': ['-mavx2', '-mfma'],
}
# What a wheel brings; nothing elsewhere.
WHEEL_LEVELS = list(CPU_FLAGS) if sys.platform == 'linux' and platform.machine() == 'x86_64' else []
logger = logging.getLogger('timm_regnet_rnn')


def find_compiler() -> str:
    """$CXX, or the first C++ compiler on the path.

    Raises:
        OSError: There is none; in one line.
    """
    compiler = os.environ.get('CXX') or next(filter(shutil.which, ('g++', 'c++', 'clang++')), '')
    if not compiler.split() or not shutil.which(compiler.split()[0]):
        raise OSError(f'no C++ compiler ({compiler or "g++, c++, clang++ or $CXX"})')
    return compiler


def library_name(level: str, compiler: str = '') -> str:
    """The file name of the library for a level of the CPU; with a compiler, of the one that it made on this machine."""
    flags = FLAGS + CPU_FLAGS.get(level, [])
    key = hashlib.sha256(repr((compiler, flags, platform.machine())).encode() + SOURCE.read_bytes()).hexdigest()
    return f'fused_cpu-{key[:16]}.so'


def sum_file(library: Path) -> Path:
    """Where the sum of a library's bytes stands."""
    return library.with_suffix('.sha256')


def _run(command: List[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors='replace')
    if done.returncode:
        raise OSError(f'{command[0]} failed: {(done.stderr.strip().splitlines() or ["no message"])[0]}')


def compile_library(level: str, compiler: str) -> bytes:
    """The shared library for a level of the CPU; on one thread, said in a warning, where the compiler has no OpenMP.

    On Linux it is not linked with an OpenMP runtime but takes torch's, which is in the process before it: one pool of
    threads. Clang's calls are of a runtime that torch's may not be, so its own is linked.

    Raises:
        OSError: The compiler failed; in one line.
    """
    words, linux = compiler.split(), sys.platform == 'linux'
    with tempfile.TemporaryDirectory() as folder:
        compiled, target = Path(folder) / 'fused_cpu.o', Path(folder) / 'fused_cpu.so'
        command = [*words, *FLAGS, *CPU_FLAGS.get(level, []), '-c', str(SOURCE), '-o', str(compiled)]
        openmp = ['-fopenmp']
        try:
            _run(command + openmp)
        except OSError:
            openmp = []
            _run(command)
            logger.warning('%s has no OpenMP: the regulators of a net run on one thread.', compiler)
        if linux and b'__kmpc_' not in compiled.read_bytes():
            openmp = []
        as_needed = ['-Wl,--as-needed'] if linux else []
        _run([*words, '-shared', *as_needed, str(compiled), *openmp, '-o', str(target)])
        return target.read_bytes()
