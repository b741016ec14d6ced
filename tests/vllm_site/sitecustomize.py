"""On the path of the processes that tests/test_vllm.py starts: lets PyPI's torchvision be imported beside a CPU-only torch.

Its operators are compiled against a CUDA torch and cannot be loaded; it then fails to import for want of their schemas.
"""

import torch

torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")
torchvision_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
