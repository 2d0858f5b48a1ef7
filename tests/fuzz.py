"""Every command on mutants of every file that it reads: `python tests/fuzz.py --cases 5000`.

Each case is a process of its own, forked, with bounded memory and time, in a folder of its own. A case fails by a
traceback, a hang, a signal, more than one line of error, more memory than `MEMORY`, a write or a connection anywhere
outside of its folder, something left behind by a refusal, or by wrong numbers without an error: a target says what
must hold where its command succeeds.
"""

import argparse
import collections
import contextlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).parent))
os.environ['HF_HUB_OFFLINE'] = '1'  # before huggingface_hub reads it: what is broken here is not fetched there

from fuzz_targets import TARGETS, make_base

from timm_regnet_rnn.ops.fused_cpu import cache_dir

SECONDS = 60  # of processor time, for a case
WALL = 600  # seconds, for a case that waits
MEMORY = 3 << 30  # bytes, beyond what the process has when it is forked
HANDLER = 'backslashreplace'  # Python's for stderr
LONGEST = 700  # characters of a line
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Case(NamedTuple):
    """What became of a case."""

    target: str
    number: int
    change: str
    status: Optional[int]
    fault: str
    detail: str
    memory: int


def watch(box: Path, log: int) -> None:
    """Note in a file what is written, started or connected to outside of the box."""
    allowed = (
        str(box.parent / 'tmp'),
        str(box),
        '/dev/null',
        '/proc/self',
        str(cache_dir()),
        os.environ['MPLCONFIGDIR'],
    )

    def hook(event, args):
        path = ''
        if event == 'open' and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITES:
            path = os.fsdecode(args[0])
        elif event in (
            'os.remove',
            'os.rename',
            'os.mkdir',
            'os.rmdir',
            'os.link',
            'os.symlink',
            'os.chmod',
            'shutil.rmtree',
        ):
            named = args[1] if event in ('os.rename', 'os.link', 'os.symlink') else args[0]
            path = os.fsdecode(named) if isinstance(named, (str, bytes, os.PathLike)) else ''
        elif event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'socket.connect'):
            words = args[1] if event == 'subprocess.Popen' else args
            if not (
                isinstance(words, (list, tuple))
                and words[:1]
                and Path(str(words[0])).name in ('git', 'lscpu', 'uname', 'fc-list')
            ):
                os.write(log, f'{event} {words!r:.200}\n'.encode())
        if path:
            folder, last = os.path.split(path)  # a link itself is removed or replaced, not what it points to
            full = os.path.realpath(path) if event == 'open' else os.path.join(os.path.realpath(folder or '.'), last)
            if not full.startswith(allowed):
                os.write(log, f'{event} {path}\n'.encode())

    sys.addaudithook(hook)


def run_case(name: str, number: int, seed: int, base: Path, root: Path, keep: bool) -> Case:
    """One case in a child."""
    target, draw = TARGETS[name], random.Random(f'{seed} {name} {number}')
    folder = root / f'{name}-{number}'
    box = folder / 'box'
    shutil.copytree(base / name, box)
    change = target.change(draw, box) if number >= 0 else 'none'
    before = {*box.rglob('*')}
    log, modules = (os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ('watch', 'modules'))
    child = os.fork()
    if child == 0:
        status = 99
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            os.setsid()
            for stream, file in ((1, 'out'), (2, 'err')):
                os.dup2(os.open(folder / file, os.O_CREAT | os.O_WRONLY), stream)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False, errors=HANDLER)
            os.chdir(box)
            tempfile.tempdir = str(folder / 'tmp')
            os.mkdir(tempfile.tempdir)
            size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            signal.alarm(WALL)
            watch(box, log)
            try:
                status = target.run(box)
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if number < 0:
                os.write(modules, '\n'.join(sys.modules).encode())
            os._exit(status or 0)
    _, code, usage = os.wait4(child, 0)
    os.close(log)
    os.close(modules)
    status = os.waitstatus_to_exitcode(code)
    memory = usage.ru_maxrss
    if number < 0:  # what the command imports is imported once for all cases to come
        for module in (folder / 'modules').read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    fault, detail = judge(target, status, folder, box, before, number, change)
    if not fault and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return Case(name, number, change, status, fault, detail, memory)


def judge(target, status, folder, box, before, number, change):
    """What is wrong with a case: its kind, and a line on it."""
    out, err = ((folder / name).read_text(errors='replace') for name in ('out', 'err'))
    lines = err.splitlines()
    last = (lines or [''])[-1]
    if status in (-signal.SIGALRM, -signal.SIGXCPU):
        return 'hang', last
    if status < 0:
        return 'signal', signal.Signals(-status).name
    if 'Traceback' in err or status == 99:
        return 'traceback', last
    outside = (folder / 'watch').read_text()
    strays = [p.name for p in folder.iterdir() if p.name not in ('box', 'out', 'err', 'watch', 'tmp', 'modules')]
    strays += [p.name for p in (folder / 'tmp').iterdir()]
    if outside or strays:
        return 'outside', (outside or str(strays)).strip().replace('\n', '; ')
    errors = [line for line in lines if 'warning: ' not in line and '; taking ' not in line]
    if status not in (0, 1, 2):
        return 'status', f'{status}: {last}'
    if status == 2 and not 1 <= len(errors) <= target.lines:
        return 'lines', f'{len(errors)}: {errors[:3]}'
    if status == 0 and errors and target.silent:
        return 'noise', f'{errors[:3]}'
    if any(len(line) > LONGEST for line in lines):
        return 'long line', f'{max(map(len, lines))}: {last[:200]}'
    if re.search(r'[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]', err.replace('\n', '')):
        return 'control', repr(last[:200])
    if status == 2:
        made = [p for p in box.rglob('*') if p not in before and not re.search(target.left, str(p.relative_to(box)))]
        if made:
            return 'left behind', ', '.join(str(p.relative_to(box)) for p in made[:5])
    if number < 0:
        target.expected = target.remember(box, out)
    wrong = target.holds(box, out, err, change, target.expected) if status == 0 else ''
    return ('wrong', wrong) if wrong else ('', '')


def prepare(folder: Path) -> Path:
    """The folder of what mutants are made of."""
    os.environ.setdefault('MPLCONFIGDIR', str(folder / 'matplotlib'))
    make_base(folder / 'base')
    return folder / 'base'


def fuzz(names: Sequence[str], cases: int, seed: int, folder: Path, say=lambda case: None, keep=False) -> List[Case]:
    """Run cases, the targets in turn; those of number -1 have nothing changed, and must succeed."""
    base = prepare(folder)
    found = []
    for number in range(-1, cases // len(names) + 1):
        for name in names:
            if number > 0 and number % TARGETS[name].every:
                continue
            case = run_case(name, number, seed, base, folder, keep)
            if number == -1:
                if case.status or case.fault:
                    print('BASE', case, flush=True)
                continue
            found.append(case)
            say(case)
    return found


def table(cases: Sequence[Case]) -> str:
    """Cases by target, and their faults by kind."""
    rows = [('target', 'cases', 'refused', 'accepted', 'faults', 'MB at most')]
    for name in dict.fromkeys(case.target for case in cases):
        mine = [case for case in cases if case.target == name]
        refused, accepted = sum(case.status != 0 for case in mine), sum(case.status == 0 for case in mine)
        kinds = collections.Counter(case.fault for case in mine if case.fault)
        words = ', '.join(f'{count} {kind}' for kind, count in kinds.items()) or '0'
        rows.append((name, len(mine), refused, accepted, words, max(case.memory for case in mine) // 1024))
    return '\n'.join(' | '.join(map(str, row)) for row in rows)


def main() -> int:
    """Run cases and print what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument('--folder', type=Path, help='keep what failed there')
    parser.add_argument('--again', type=int, help='run only the case of this number, and keep it')
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix='fuzz-'))

    cases: List[Case] = []

    def say(case: Case) -> None:
        cases.append(case)
        if case.fault:
            print(f'{case.target} {case.number} [{case.change}] {case.fault}: {case.detail[:300]}', flush=True)

    start = time.monotonic()
    if args.again is not None:
        base = prepare(folder)
        for name in args.only:
            run_case(name, -1, args.seed, base, folder, True)
            case = run_case(name, args.again, args.seed, base, folder, True)
            print(case)
            print((folder / f'{name}-{args.again}' / 'err').read_text())
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped, it says what it has
    with contextlib.suppress(KeyboardInterrupt):
        fuzz(args.only, args.cases, args.seed, folder, say)
    print(table(cases))
    print(f'{len(cases)} cases, {sum(bool(case.fault) for case in cases)} faults, {time.monotonic() - start:.0f} s')
    return int(any(case.fault for case in cases))


if __name__ == '__main__':
    sys.exit(main())
