"""Bytes of all live tensors; shared storages count once."""

import gc

import torch


def live_bytes() -> int:
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.layout is torch.strided)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
