"""Training with pyx_xent.torch on two processes, by torch.distributed with gloo: DDP, FSDP2, gradient accumulation."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

BEGIN = """
import os
import torch, torch.distributed as dist
import pyx_xent.torch as ours
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
CLASSES, WIDTH, ROWS = 12, 8, 6
features = torch.randn(2, ROWS, WIDTH)
target = torch.randint(CLASSES, (2, ROWS))
target[0, 0] = -100

def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, CLASSES))

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
"""
END = """
dist.barrier()
dist.destroy_process_group()
print("done", flush=True)
os._exit(0)  # PyTorch's own threads now and then abort a process that ends: 1 in 30 of FSDP2 without this package (2.13, gloo)
"""
PROGRAMS = {
    "DDP": """
mine = torch.nn.parallel.DistributedDataParallel(model())
ours.cross_entropy(mine(features[rank]), target[rank]).backward()
alone = model()
losses = [torch.nn.functional.cross_entropy(alone(features[r]), target[r]) for r in range(2)]
(sum(losses) / 2).backward()
for p, q in zip(mine.module.parameters(), alone.parameters()):
    close(p.grad, q.grad)
""",
    "no_sync with the number of all tokens": """
mine = torch.nn.parallel.DistributedDataParallel(model())
count = torch.tensor(float((target != -100).sum()))  # of all ranks and micro-batches
for k, rows in enumerate((slice(0, 3), slice(3, 6))):
    with mine.no_sync() if k == 0 else torch.enable_grad():
        ours.cross_entropy(mine(features[rank][rows]), target[rank][rows], normalizer=count / 2).backward()
alone = model()
torch.nn.functional.cross_entropy(alone(features.flatten(0, 1)), target.flatten()).backward()
for p, q in zip(mine.module.parameters(), alone.parameters()):
    close(p.grad, q.grad)
""",
    "FSDP2": """
from torch.distributed.fsdp import fully_shard

class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Linear(WIDTH, 16)
        self.criterion = ours.LinearCrossEntropyLoss(16, CLASSES, bias=True)
    def forward(self, x, y):
        return self.criterion(self.body(x).tanh(), y)

mine, alone = Head(), Head()
fully_shard(mine.body); fully_shard(mine.criterion); fully_shard(mine)
optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (mine, alone)]
for step in range(3):
    for optimizer in optimizers:
        optimizer.zero_grad()
    mine(features[rank], target[rank]).backward()
    (sum(alone(features[r], target[r]) for r in range(2)) / 2).backward()
    for optimizer in optimizers:
        optimizer.step()
for p, q in zip(mine.parameters(), alone.parameters()):
    close(p.full_tensor(), q)
""",
    "FSDP2 with the fused loss": """
from torch.distributed.fsdp import fully_shard
mine, alone = model(), model()
for layer in mine:
    fully_shard(layer)
fully_shard(mine)
for step in range(3):
    ours.cross_entropy(mine(features[rank]), target[rank]).backward()
    (sum(ours.cross_entropy(alone(features[r]), target[r]) for r in range(2)) / 2).backward()
for p, q in zip(mine.parameters(), alone.parameters()):
    close(p.grad.full_tensor(), q.grad)
""",
    "a fused head under DDP": """
mine, alone = model(), model()
fused = ours.fuse_head(mine[2])
parallel = torch.nn.parallel.DistributedDataParallel(mine)
for step in range(2):
    torch.nn.functional.cross_entropy(parallel(features[rank]), target[rank]).backward()
    losses = [torch.nn.functional.cross_entropy(alone(features[r]), target[r]) for r in range(2)]
    (sum(losses) / 2).backward()
assert fused.fused == 2, fused
for p, q in zip(mine.parameters(), alone.parameters()):
    close(p.grad, q.grad)
""",
    "a fused head under FSDP2": """
from torch.distributed.fsdp import fully_shard

class Model(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.layers, self.inside = model(), inside
    def forward(self, x, y):
        logits = self.layers(x)
        return torch.nn.functional.cross_entropy(logits, y) if self.inside else logits

for inside in (True, False):
    for shard_head in (True, False):
        mine, alone = Model(inside), Model(True)
        fused = ours.fuse_head(mine.layers[2])
        fully_shard(mine.layers[0])
        if shard_head:
            fully_shard(mine.layers[2])
        fully_shard(mine)
        for step in range(2):
            out = mine(features[rank], target[rank])
            (out if inside else torch.nn.functional.cross_entropy(out, target[rank])).backward()
            (sum(alone(features[r], target[r]) for r in range(2)) / 2).backward()
        assert fused.fused == (2 if inside and not shard_head else 0), fused
        for p, q in zip(mine.parameters(), alone.parameters()):
            close(p.grad.full_tensor(), q.grad)
""",
    "DTensor logits": """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
mesh = init_device_mesh("cpu", (2,))
logits = features[:, :, :WIDTH].flatten(0, 1)
labels = (target % WIDTH).flatten()
for placement in (Replicate(), Shard(0)):
    found = ours.cross_entropy(distribute_tensor(logits, mesh, [placement]), distribute_tensor(labels, mesh, [placement]))
    close(found.full_tensor(), torch.nn.functional.cross_entropy(logits, labels))
    sharded = distribute_tensor(logits.clone(), mesh, [placement]).requires_grad_()
    labels_too = distribute_tensor(labels, mesh, [placement])
    alone = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(alone, labels).backward()
    ours.cross_entropy(sharded, labels_too).backward()
    close(sharded.grad.full_tensor(), alone.grad)
    with ours.patch() as patch:
        close(torch.nn.functional.cross_entropy(sharded, labels_too).full_tensor(), found.full_tensor())
    assert patch.passed_on == {"tensor class DTensor": 1}
    log_p = sharded.detach().log_softmax(1)
    close(ours.nll_loss(log_p, labels_too).full_tensor(), found.full_tensor())
    head = distribute_tensor(torch.eye(WIDTH), mesh, [Replicate()])
    close(ours.linear_cross_entropy(sharded.detach(), head, labels_too).full_tensor(), found.full_tensor())
    for wrong in (lambda: ours.cross_entropy(sharded, labels), lambda: ours.cross_entropy(sharded, labels_too, z_loss=0.1)):
        try:
            wrong()
        except RuntimeError as error:
            assert "DTensor" in str(error) or "z_loss needs" in str(error), error
        else:
            raise AssertionError("a mixture, and what PyTorch lacks, have to be refused")
""",
}


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


@pytest.mark.parametrize("what", PROGRAMS)
def test_two_processes(what):
    port, folder = free_port(), Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", BEGIN + PROGRAMS[what] + END],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
            assert said.rstrip().endswith("done"), said
    finally:
        for process in processes:
            process.kill()
