"""Bytes of all live tensors; shared storages count once."""

import gc

import torch


def live_bytes() -> int:
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.layout is torch.strided:
            try:
                storage = thing.untyped_storage()
            except NotImplementedError:  # what vmap made of a tensor has none of its own
                continue
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
