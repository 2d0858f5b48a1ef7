import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys, torch, torch.distributed as dist, timm, timm_regnet_rnn
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
dist.init_process_group('gloo')
rank = dist.get_rank()
for kwargs in ({}, dict(share_regulator=False), dict(regulated_stages=(1,))):
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = timm.create_model('regnet_convlstm_20', layers=(2, 1, 1), zero_init_last=False, **kwargs)
        net.set_grad_checkpointing(checkpointing)
        model = DDP(net)
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(1 + rank)
        for _ in range(2):
            loss = model(torch.randn(2, 3, 16, 16)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        for name, p in net.named_parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach().contiguous())
            assert torch.equal(*both), name
            assert p.grad.abs().sum() > 0, name
print('trained on', rank)
sys.stdout.flush()
del model
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # the interpreter's teardown of gloo's threads has aborted now and then, after everything had passed
"""


def test_two_processes_stay_equal(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text(SCRIPT)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('trained on') == 2
