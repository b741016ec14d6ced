"""What the tests of the whole system share: a clip in memory, a small layout, a question."""

import torch

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
QUESTION = "What is it?"


class Clip:
    """An opened video of noise, its frames told apart by their brightness."""

    path, fps, size, decoder = "clip", 25.0, (30, 40), "memory"

    def __init__(self, total=20):
        self.total = total
        generator = torch.Generator().manual_seed(total)
        light = torch.linspace(1, 200, total).view(-1, 1, 1, 1)
        self.pictures = (light + torch.randint(0, 55, (total, *self.size, 3), generator=generator)).to(
            torch.uint8
        )

    def frames(self, indices):
        return self.pictures[list(indices)]


class Unreadable(Clip):
    def frames(self, indices):
        raise AssertionError("frames were decoded although the question cannot be answered")
