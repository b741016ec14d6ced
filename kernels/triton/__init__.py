"""The Triton kernels, installed as `sfllava_fast._triton`: the functions that launch them."""

from .pool_launch import pool as pool
from .pool_launch import pool_backward as pool_backward
from .project_launch import project_pool as project_pool
from .project_launch import project_pooled as project_pooled
from .rows_launch import attention_received_out as attention_received_out
from .rows_launch import gather_rows_out as gather_rows_out
from .rows_launch import scatter_rows_out as scatter_rows_out
from .rows_launch import scatter_rows_weighted_out as scatter_rows_weighted_out
from .rows_launch import top_per_frame_out as top_per_frame_out
from .tiling import find_tiling as find_tiling
