"""python tests/triton_ahead_project.py ARCH FILE: as triton_ahead.py, the projector's kernels at their real sizes.

Writes a list of {kernel, name, tile, first, ptx, sass, registers, stack, local} as JSON; `first`: the tile that is used.
"""

import json
import sys
from pathlib import Path

import torch
from triton.runtime.driver import driver
from triton_ahead import Target, resources

from sfllava_fast import backends

INNER = 4096
# Whether patches are kept, units are tokens, some units are no whole box; patches of a unit.
LAYOUTS = {
    "the default layout": (True, False, False, 4),
    "pairs that nest": (False, True, False, 2),
    "overlapping boxes": (True, True, True, 4),
    "single patches": (True, True, False, 1),
}


def cases(launch, major):
    """Kernel, what is compiled, tensors' dtypes, the constants between the numbers and the tile, tile, its place."""
    half, single = (torch.bfloat16, torch.float16), torch.float32
    for place, tile in enumerate(launch.POOL_TILES[major]):
        for name, layout in list(LAYOUTS.items())[: 3 if place else None]:
            for dtype in half if not place and name == "the default layout" else half[:1]:
                dtypes = (dtype, dtype, dtype, torch.int32, single, dtype)
                yield launch.project_tiles, f"{name}, {dtype}", dtypes, (True, INNER, True, *layout), tile, place
    for place, tile in enumerate(launch.ROWS_TILES[major]):
        for dtype in half[: 1 if place else 2]:
            largest = torch.finfo(dtype).max
            yield launch.project_rows, str(dtype), (single, dtype, dtype, dtype), (True, INNER, True, largest), tile, place


def compile_for(arch):
    driver.set_active(Target(arch))
    launch = backends.triton_kernels().project_launch
    for kernel, name, dtypes, constants, tile, place in cases(launch, arch // 10):
        constants = (*constants, *tile[:3], 8)
        compiled = launch.compile_kernel(kernel, dtypes, constants, tile.warps, tile.stages, arch)
        yield {
            "kernel": kernel.fn.__name__,
            "name": name,
            "tile": tile,
            "first": not place,
            "ptx": compiled.asm["ptx"],
            "sass": compiled.asm["sass"],
            **resources(compiled.asm["cubin"]),
        }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(list(compile_for(int(sys.argv[1])))))
