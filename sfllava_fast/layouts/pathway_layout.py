"""Any layout as a list of pathways, and its text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from ..errors import LayoutError
from .layout import Layout, is_count
from .pathways import AxisRule, Pathway, Separator

_EXAMPLE = "pool:each,stride2,stride2,mean"
_AXIS = "each|(?:stride|adaptive|linspace)[0-9]{1,7}"
_FRAMES, _SPACE = f"({_AXIS}|(?:repeat|every|others)[0-9]{{1,7}})", f"({_AXIS}|linear[0-9]{{1,7}})"
_PATHWAY = re.compile(
    rf"(\w+):{_FRAMES},{_SPACE},{_SPACE},(max|mean)(,flat)?(,class)?(?:,pad([0-9]{{1,7}}))?", re.ASCII
)
_OPTION = re.compile(r"(interleaved)|(before)|(\w+)@(row|frame|between|end)|canvas([0-9]{1,3})x([0-9]{1,3})", re.ASCII)
# Frames cut alone, so that what adjoins in an interleaved layout is known of every frame.
_ALONE = ("each", "every", "others")


@dataclass(frozen=True)
class Pathways(Layout):
    """Any layout. As text: its pathways joined by "+", what else there is to say behind them, each after a ";".

    A pathway is `name:frames,rows,cols,reduce`, with `,flat`, `,class` or `,pad100` behind it: `pool:each,stride2,
    stride2,mean` averages 2 x 2 patches of every frame. The rest: `interleaved`, `before` (the projector), `canvas3x2`
    (rows x columns of frames), and separators as `newline@row`, `@frame`, `@between` or `@end`.

    Raises LayoutError, in a line that says why, for anything that is no layout.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None
    frames: int | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for path in self.pathways:
            _check_pathway(path)
        names = [part.name for part in (*self.pathways, *self.separators)]
        if not self.pathways or len(set(names)) < len(names):
            raise LayoutError("a layout needs one pathway or more, and each pathway and separator another name")
        rules = {path.frames for path in self.pathways}
        whole = (
            any(AxisRule("others", bins.size) in rules for bins in rules if bins.rule == "every")
            or AxisRule("each") in rules
        )
        if self.interleaved and not (whole and all(bins.rule in _ALONE for bins in rules)):
            raise LayoutError("pathways are interleaved frame by frame: take frames by each, or by every and others")
        padded = any(path.pad for path in self.pathways)
        if padded and (self.interleaved or any(separator.where != "end" for separator in self.separators)):
            raise LayoutError("a padded pathway has nothing between its tokens: leave interleaved and separators out")
        options = [*map(str, self.separators)]
        options += ["interleaved"] * self.interleaved + ["before"] * (self.stage == "before")
        options += ["canvas{}x{}".format(*self.canvas)] if self.canvas else []
        if not all(map(_OPTION.fullmatch, options)) or (self.canvas and 0 in self.canvas):
            raise LayoutError(f"unknown part of a layout among {', '.join(options)}: write newline@row or canvas3x2")
        object.__setattr__(self, "_string", ";".join(["+".join(map(str, self.pathways)), *options]))

    @classmethod
    def parse(cls, layout: str) -> Pathways:
        """The layout that a text of this form describes."""
        return _parse_pathways(layout)

    def __str__(self) -> str:
        return self._string


@lru_cache(maxsize=256)
def _parse_pathways(layout: str) -> Pathways:
    paths, *options = layout.split(";")
    matches = [_PATHWAY.fullmatch(part) for part in paths.split("+")]
    if not all(matches):
        raise LayoutError(f"unknown layout {layout!r}: write its pathways like {_EXAMPLE}")
    given: dict[str, object] = {"separators": ()}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            known = "interleaved, before, newline@row or canvas3x2"
            raise LayoutError(f"unknown option {option!r} of a layout: write {known}")
        interleaved, before, name, where, rows, cols = match.groups()
        if name:
            given["separators"] += (Separator(name, where),)
        elif rows:
            given["canvas"] = int(rows), int(cols)
        else:
            given |= {"interleaved": True} if interleaved else {"stage": before}
    return Pathways(tuple(map(_pathway, matches)), **given)


def _pathway(match: re.Match[str]) -> Pathway:
    flat, class_token = (flag is not None for flag in match.group(6, 7))
    return Pathway(match[1], *map(_bins, match.group(2, 3, 4)), match[5], flat, class_token, int(match[8] or 0))


def _bins(text: str) -> AxisRule:
    rule = text.rstrip("0123456789")
    return AxisRule(rule, int(text[len(rule) :] or 1))


def _check_pathway(path: Pathway) -> None:
    sizes = (bins.size for bins in (path.frames, path.rows, path.cols))
    counted = all(is_count(size, least=1) for size in sizes) and is_count(path.pad, least=0)
    if not counted or not _PATHWAY.fullmatch(str(path)):
        raise LayoutError(f"unknown pathway {str(path)!r}: write it like {_EXAMPLE}")
    rules = path.rows.rule, path.cols.rule
    if "linear" in rules and (set(rules) != {"linear"} or path.reduce != "mean" or path.flat):
        raise LayoutError(f"pathway {path.name}: linear bins are of rows and columns both, and of a mean")
    if path.class_token and (set(rules) != {"each"} or path.flat):
        raise LayoutError(f"pathway {path.name}: the class token has one row and one column, each")
