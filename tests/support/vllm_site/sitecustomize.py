"""On the path of tests/serving/test_vllm.py and of what it starts: PyPI's torchvision beside a CPU-only torch.

Its operators are compiled against a CUDA torch and cannot be loaded, and it fails to import for want of their schemas.
"""

import torch

torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")
torchvision_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
