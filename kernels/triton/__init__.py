"""The Triton kernels, installed as `sfllava_fast._triton`: the functions that launch them."""

from .pool_launch import pool as pool
from .pool_launch import pool_backward as pool_backward
from .project_launch import project_pool as project_pool
from .project_launch import project_pooled as project_pooled
from .rows_launch import blend_rows as blend_rows
from .rows_launch import copy_rows as copy_rows
from .rows_launch import receive_attention as receive_attention
from .rows_launch import replace_rows as replace_rows
from .rows_launch import select_rows as select_rows
from .tiling import find_tiling as find_tiling
