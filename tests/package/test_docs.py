"""The documentation: its links, its figures, and the docstrings that the API reference is built from."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")),
    ROOT / "sfllava_fast/embedded/model/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [
    name
    for page in sorted((ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Every link that is no URL leads to a file, and to a heading of it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_are_listed():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def find(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_docstrings(name):
    """In the API reference: names, and the public methods and properties of classes, inherited docstrings included."""
    thing = find(name)
    members = [member for member in vars(thing) if not member.startswith("_")] if inspect.isclass(thing) else []
    documented = (inspect.isroutine, inspect.isdatadescriptor)
    missing = [
        member
        for member in members
        if any(kind(inspect.getattr_static(thing, member)) for kind in documented)
        and not inspect.getdoc(getattr(thing, member))
    ]
    assert inspect.getdoc(thing) and not missing, missing


def test_every_public_name_is_in_the_reference():
    import sfllava_fast

    listed = {name.rpartition(".")[2] for name in NAMES}
    assert set(sfllava_fast.__all__) - {"__version__"} <= listed


MILAN, GENOA = "cpu-amd-epyc-milan", "cpu-amd-epyc-genoa"
PREPARE = "prepare_slowfast slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
# Rows of README's table: (command, work, bar) of each figure; the dtypes are joined by a slash.
TABLE = {
    "the op,": ("op", "{} D=4096", "best peer"),
    "its backward": ("op", "backward {} D=4096", "torch"),
    "SF-LLaVA's `prepare_slowfast`": ("dropins", PREPARE + " {}", "patched: published"),
    "SF-LLaVA's `spatial_1d_avg_pool`": (
        "dropins",
        "temporal_aggregation spatial_1d_avg_pool {}",
        "patched: published",
    ),
    "projector and pooling": ("projector", "{} spatial_1d_max_pool", "commuted: exact"),
    "decoded frames to first token": ("pipeline", "first token, from decoded frames", "ours: plain"),
    "the same with decoding": ("pipeline", "first token, decoding included", "ours: plain"),
    "prefill of its": ("pipeline", "prefill", "ours: plain"),
}


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("device", [MILAN, GENOA])
def test_figures_of_the_readme(row, device):
    """README's figures are those of the committed results."""
    command, work, bar = TABLE[row]
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {row}")]
    cell = [cell.strip() for cell in line.split("|")][{MILAN: 3, GENOA: 4}[device]]
    names = [work.format(dtype) for dtype in ("float32", "bfloat16")] if "{}" in work else [work]
    file = ROOT / "bench/results" / device / f"{command}.json"
    works = json.loads(file.read_text())["works"] if file.exists() else {}
    if cell == "-":
        assert not set(names) & works.keys()
        return
    for name, figure in zip(names, cell.split(" / "), strict=True):
        decimals = len(figure.partition(".")[2])
        assert float(figure) == pytest.approx(works[name]["bars"][bar]["ratio"], abs=0.501 * 10**-decimals)
