"""The aggregator alone: patch features of a video in, SlowFast-LLaVA tokens out.

    python examples/op.py

Needs nothing but torch and numpy. Random features take the place of a vision encoder's.
"""

import torch
import torch.nn.functional as F

from sfllava_fast import parse_layout, slowfast_aggregate

torch.manual_seed(0)
hidden = torch.randn(50, 1 + 24 * 24, 256)  # [T, 1 + N, D]: 50 frames, a class token and 24 x 24 patches, 256 channels
features = hidden[:, 1:]  # a view without the class token; the op reads it as it is, without a copy

tokens = slowfast_aggregate(features)
plan = parse_layout("sf_llava").plan(frames=50, grid=(24, 24))
print("tokens:", list(tokens.shape), plan.tokens)  # [3680, 256]: 10 frames x 288, then 50 frames x 16

# The same in plain PyTorch: 10 frames pooled by pairs of patches, then every frame pooled to 4 x 4.
slow = features[torch.linspace(0, 50, 11).int()[:-1].long()]
slow = F.max_pool1d(slow.transpose(1, 2), 2).transpose(1, 2).reshape(-1, 256)
pictures = features.transpose(1, 2).reshape(50, 256, 24, 24)
fast = F.adaptive_avg_pool2d(pictures, (4, 4)).flatten(2).transpose(1, 2).reshape(-1, 256)
print("largest difference from plain PyTorch:", f"{(tokens - torch.cat([slow, fast])).abs().max().item():.0e}")

# `out=` writes into memory that you own, such as the rows of a language model's inputs_embeds.
embeds = torch.zeros(35 + 3680 + 12, 256)
slowfast_aggregate(features, out=embeds[35 : 35 + 3680])
print("written in place:", torch.equal(embeds[35:-12], tokens))

# Videos of several lengths in one call: packed frames and cumulative offsets.
packed, offsets = slowfast_aggregate(features, "pllava", frame_offsets=[0, 16, 50])
print("two videos under another layout:", list(packed.shape), offsets.tolist())
