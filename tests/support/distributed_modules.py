"""A small model of the two modules, and what each process of a distributed run does with it."""

import torch
import torch.distributed as dist
from torch import nn

from sfllava_fast import FusedProjectorAggregator, SlowFastAggregator

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
C, D, SIDE = 24, 40, 6


def make_projector(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(C, 64), nn.GELU(), nn.Linear(64, D))


def make_hidden(frames=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(frames, SIDE**2 + 1, C, generator=generator).to(dtype)[:, 1:]


class Net(nn.Module):
    """A trainable model with both modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(C, C)
        self.tokens = FusedProjectorAggregator(make_projector(), LAYOUT)
        self.pool = SlowFastAggregator("slowfast-fast_2x2")

    def forward(self, hidden):
        hidden = self.first(hidden)
        return self.tokens(hidden).square().mean() + self.pool(hidden).square().mean()


def make_net():
    torch.manual_seed(3)
    return Net()


def wrappings():
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp import fully_shard

    def shard(part=None):
        def wrap(net):
            if part:
                fully_shard(getattr(net.tokens, part))
            return fully_shard(net)

        return wrap

    def flat_projector(net):
        net.tokens.projector = Fsdp(net.tokens.projector, use_orig_params=True, device_id=torch.device("cpu"))
        return net

    yield "ddp", nn.parallel.DistributedDataParallel
    yield "fsdp", lambda net: Fsdp(net, use_orig_params=True, device_id=torch.device("cpu"))
    yield "fsdp projector", flat_projector
    yield "fully_shard", shard()
    yield "fully_shard projector", shard("projector")


def work(rank, world, file, out):
    """One training step and one inference pass with every wrapper, on this rank's videos."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {}
    for name, wrap in wrappings():
        net = wrap(make_net())
        optimizer = torch.optim.SGD(net.parameters(), lr=10)
        net(make_hidden(5 + rank)).backward()
        if name == "fsdp projector":  # FSDP does not average gradients outside of its module
            for weight in net.first.parameters():
                dist.all_reduce(weight.grad)
                weight.grad /= world
        optimizer.step()
        with torch.no_grad():
            found[name] = net(make_hidden(7)).item()
    if rank == 0:
        torch.save(found, out)
    dist.barrier()  # a rank that ended before the other was seen to abort
    dist.destroy_process_group()
