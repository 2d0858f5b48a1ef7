"""Memory that nobody owns is never written: nets run with every buffer of torch's between protected pages.

A small library stands in for posix_memalign: each buffer ends at a page that must not be touched, and what lies before
it and in the gap behind it is checked when it is freed. Found this way: oneDNN's backward pass of a strided 1x1
convolution of fewer than 16 channels, see `layers.SampledConv2d`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('gcc'), reason='needs Linux and gcc'),
]

GUARD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define PAGE 4096UL
#define SLOTS (1UL << 18)
typedef struct { void *user, *base; size_t length, size; } Buffer;
static Buffer table[SLOTS];
static volatile int lock;
static void (*next_free)(void *);
static int (*next_align)(void **, size_t, size_t);
static size_t slot(void *p) { return ((uint64_t)p >> 6) * 0x9E3779B97F4A7C15UL >> 46; }
static void start(void) {
  if (!next_free) next_free = dlsym(RTLD_NEXT, "free");
  if (!next_align) next_align = dlsym(RTLD_NEXT, "posix_memalign");
}
int posix_memalign(void **out, size_t align, size_t size) {
  start();
  if (align != 64 || !size) return next_align(out, align, size);
  size_t user = (size + 63) & ~63UL, body = (user + PAGE - 1) & ~(PAGE - 1), length = body + PAGE;
  char *base = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return ENOMEM;
  mprotect(base + body, PAGE, PROT_NONE);
  memset(base, 0xA5, body);
  char *p = base + body - user;
  memset(p, 0xFF, size);
  while (__sync_lock_test_and_set(&lock, 1)) {}
  size_t i = slot(p);
  while (table[i].user && table[i].user != (void *)1) i = (i + 1) % SLOTS;
  table[i] = (Buffer){p, base, length, size};
  __sync_lock_release(&lock);
  *out = p;
  return 0;
}
void free(void *p) {
  Buffer b = {0};
  start();
  if (p && !((uint64_t)p & 63)) {
    while (__sync_lock_test_and_set(&lock, 1)) {}
    for (size_t i = slot(p); table[i].user; i = (i + 1) % SLOTS)
      if (table[i].user == p) { b = table[i]; table[i].user = (void *)1; break; }
    __sync_lock_release(&lock);
  }
  if (!b.user) { next_free(p); return; }
  unsigned char *c = b.base, *end = (unsigned char *)b.base + b.length - PAGE;
  for (; c < end; c++) {
    if (c == p) c += b.size;
    if (c < end && *c != 0xA5) { write(2, "GUARD: a write beyond a buffer\n", 31); abort(); }
  }
  munmap(b.base, b.length);
}
"""

NETS = """
import random, sys, torch
from timm_regnet_rnn.regulated_resnet import RegulatedResNet
torch.set_num_threads(int(sys.argv[2]))
for seed in range(int(sys.argv[1])):
    pick = random.Random(seed)
    # widths of the op (multiples of 16) and others, and 8, on which oneDNN's own backward pass was caught
    widths = (4, 8, 15, 16, 32) if seed % 2 else (16, 32)
    channels = [pick.choice(widths) for _ in range(pick.randint(1, 3))]
    channels[0] += channels[0] % 2
    layers = [2] + [1] * (len(channels) - 1)
    kwargs = dict(stem_type=pick.choice(('', 'cifar')), regulator=pick.choice(('convrnn', 'convgru', 'convlstm', None)))
    net = RegulatedResNet(pick.choice(('basic', 'bottleneck')), layers, 3, channels=channels, **kwargs)
    x = torch.randn(4, 3, pick.randint(20, 66), pick.randint(20, 66), requires_grad=seed % 3 == 0)
    if seed % 4:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    net(x).square().sum().backward()
    with torch.no_grad():
        net.eval()(x)
print('whole')
"""

STRIDED = """
import torch
from timm_regnet_rnn import layers
x = torch.randn(4, 8, 62, 44).contiguous(memory_format=torch.channels_last)
net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1, 2, bias=False))  # as it is, a segmentation fault on AVX-512
layers.sample_first(net)
net(x).sum().backward()
"""


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
    """Runs Python code with guarded buffers; the finished process."""
    folder = tmp_path_factory.mktemp('guard')
    (folder / 'guard.c').write_text(GUARD)
    command = ['gcc', '-O1', '-shared', '-fPIC', 'guard.c', '-o', 'guard.so', '-ldl']
    subprocess.run(command, cwd=folder, check=True, capture_output=True)

    def run(code, *args):
        root = str(Path(__file__).resolve().parent.parent)
        env = {**os.environ, 'LD_PRELOAD': str(folder / 'guard.so'), 'PYTHONPATH': root}
        return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, env=env)

    return run


@pytest.mark.parametrize('offset', [100, 10**4], ids=['in the gap', 'in the protected page'])
def test_the_guard_sees_a_write_beyond_a_buffer(guarded, offset):
    code = f'import ctypes, torch; x = torch.zeros(25); ctypes.memset(x.data_ptr() + {offset}, 1, 1); del x'
    assert guarded(code).returncode in (-6, -11)


@pytest.mark.parametrize('threads, nets', [(1, 40), (2, 12)])  # threads that share two cores with other tests are slow
def test_nets_write_where_they_may(guarded, threads, nets):
    done = guarded(NETS, str(nets), str(threads))
    assert done.returncode == 0 and done.stdout == 'whole\n', done.stderr[-2000:]


def test_strided_convolutions_of_few_channels(guarded):
    done = guarded(STRIDED)
    assert done.returncode == 0, done.stderr
