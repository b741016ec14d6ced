"""The drop-in for the published SF-LLaVA code, against a stand-in with its interface and against float64 loops."""

import copy
import re
import sys
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import VIEWS
from torch import nn

from sfllava_fast.errors import BackendError, PatchError
from sfllava_fast.patch import patch_slowfast_llava, undo
from sfllava_fast.patch.replacement import warn_once

NAMES = (
    "concat", "spatial_1d_max_pool", "spatial_1d_avg_pool", "spatial_2d_max_pool", "spatial_2d_avg_pool",
    "spatial_temporal_pool", "temporal_global_pool",
)  # fmt: skip
METHODS = ("prepare_slowfast", "temporal_aggregation")
PAPER = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Mixin:
    """The methods, names and errors of the published code, in our own words: PyTorch's poolings with channels first."""

    def temporal_aggregation(self, image_features, temporal_aggregation):
        frames, patches, channels = image_features.shape
        side = int(patches**0.5)

        def flat(pool):
            return pool(image_features.transpose(1, 2), 2).transpose(1, 2).view(-1, channels)

        def square(pool):
            pooled = pool(image_features.view(frames, side, side, channels).permute(3, 0, 1, 2))
            return pooled.flatten(1).t()

        pools = {
            "concat": lambda: image_features.view(-1, channels),
            "spatial_1d_max_pool": lambda: flat(F.max_pool1d),
            "spatial_1d_avg_pool": lambda: flat(F.avg_pool1d),
            "spatial_2d_max_pool": lambda: square(lambda x: F.max_pool2d(x, 2)),
            "spatial_2d_avg_pool": lambda: square(lambda x: F.avg_pool2d(x, 2)),
            "spatial_temporal_pool": lambda: square(lambda x: F.adaptive_avg_pool3d(x, (16, 12, 12))),
            "temporal_global_pool": lambda: image_features.mean(0),
        }
        if temporal_aggregation not in pools:
            raise ValueError(f"Unknown temporal aggregation method: {temporal_aggregation}")
        return pools[temporal_aggregation]()[None]

    def prepare_slowfast(self, image_features, temporal_aggregation):
        frames, patches, channels = image_features.shape
        found = re.fullmatch(r"slowfast-slow_(\d+)frms_(\w+)-fast_(\d+)x(\d+)", temporal_aggregation)
        if found is None:
            raise ValueError(f"Failed to parse the temporal aggregation for slowfast: {temporal_aggregation}")
        slow, pool, *fast = found.groups()
        chosen = torch.linspace(0, frames, int(slow) + 1)[:-1].int().tolist()
        side = int(patches**0.5)
        grid = image_features.view(frames, side, side, channels).permute(3, 0, 1, 2)
        pooled = F.adaptive_avg_pool2d(grid, tuple(map(int, fast))).flatten(1).t()[None]
        return torch.cat([self.temporal_aggregation(image_features[chosen], pool), pooled], dim=1)


class Model(nn.Module, Mixin):
    pass


class Older(Mixin):
    def prepare_slowfast(self, image_features):
        raise NotImplementedError


class LlavaNext:
    def get_2dPool(self, image_feature, stride=2):
        raise NotImplementedError

    add_token_per_grid = add_token_per_frame = lambda self, image_feature: image_feature


def loops(features, name):
    """Tokens [S, D] in float64 of an aggregation or a slowfast string."""
    x = features.double().numpy()
    side = int(x.shape[1] ** 0.5)
    if found := re.fullmatch(r"slowfast-slow_(\d+)frms_(\w+)-fast_(\d+)x(\d+)", name):
        return oracle.tokens(x, (side, side), int(found[1]), found[2], (int(found[3]), int(found[4])))
    if name == "temporal_global_pool":
        return x.mean(0)
    if name == "spatial_temporal_pool":
        frames = [oracle.mean(list(x[list(oracle.adaptive_bin(i, len(x), 16))])) for i in range(16)] if len(set(
            len(oracle.adaptive_bin(i, len(x), 16)) for i in range(16))) else []
        return np.array([token for frame in frames for token in oracle.fast_tokens(frame, (side, side), (12, 12))])
    return np.array([token for frame in x for token in oracle.slow_tokens(frame, (side, side), name)])
