"""Imports parts of the package that are installed as subpackages, or lie beside it in a source checkout."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType


@cache
def import_part(name: str, folder: str) -> ModuleType:
    """The installed package `sfllava_fast.<name>`, or in a source checkout the package in `folder`."""
    name = f"{__package__}.{name}"
    if util.find_spec(name):
        return import_module(name)
    path = Path(__file__).parents[1] / folder
    spec = util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec and spec.loader
    sys.modules[name] = module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
