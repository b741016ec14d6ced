"""Imports `_triton` and `_bench` as installed subpackages, or from their folders in a source checkout."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType


@cache
def import_part(name: str, folder: str) -> ModuleType:
    """The package installed as `sfllava_fast.<name>`; in a checkout that is not installed, the folder."""
    name = f"{__package__}.{name}"
    if util.find_spec(name):
        return import_module(name)
    path = Path(__file__).parents[1] / folder
    spec = util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None and spec.loader is not None  # of a path with a suffix
    sys.modules[name] = module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
