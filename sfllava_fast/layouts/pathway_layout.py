"""A layout as a list of any pathways, and its text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

from ..errors import LayoutError
from .layout import Layout, is_count
from .pathways import AxisRule, Pathway, Place, Reduction, Rule, Separator

_EXAMPLE = "pool:each,stride2,stride2,mean"
_AXIS = "each|(?:stride|adaptive|linspace)[0-9]{1,7}"
_FRAMES, _SPACE = f"({_AXIS}|(?:repeat|every|others)[0-9]{{1,7}})", f"({_AXIS}|linear[0-9]{{1,7}})"
_PATHWAY = re.compile(
    rf"(\w+):{_FRAMES},{_SPACE},{_SPACE},(max|mean)(,flat)?(,class)?(?:,pad([0-9]{{1,7}}))?", re.ASCII
)
_OPTION = re.compile(r"(interleaved)|(before)|(\w+)@(row|frame|between|end)|canvas([0-9]{1,3})x([0-9]{1,3})", re.ASCII)
# Rules whose bins are single frames, so that an interleaved layout can be ordered by frame.
_ALONE = ("each", "every", "others")


@dataclass(frozen=True)
class Pathways(Layout):
    """A layout of any pathways.

    Its text is the pathways, joined by "+", then the options, each after a ";".

    - A pathway is `name:frames,rows,cols,reduce`, then `,flat`, `,class` or `,pad100` if needed:
      `pool:each,stride2,stride2,mean` averages 2 x 2 patches of every frame.
    - The options are `interleaved`, `before` (the projector), `canvas3x2` (rows x columns of frames), and separators:
      `newline@row`, `newline@frame`, `newline@between` or `newline@end`.

    The attributes are those of `Layout`.

    Raises:
        LayoutError: If the parts do not make a layout.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None
    _string: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for path in self.pathways:
            _check_pathway(path)
        names = [path.name for path in self.pathways] + [separator.name for separator in self.separators]
        if not self.pathways or len(set(names)) < len(names):
            raise LayoutError("a layout needs at least one pathway, and unique names of pathways and separators")
        rules = {path.frames for path in self.pathways}
        whole = (
            any(AxisRule("others", bins.size) in rules for bins in rules if bins.rule == "every")
            or AxisRule("each") in rules
        )
        if self.interleaved and not (whole and all(bins.rule in _ALONE for bins in rules)):
            raise LayoutError("interleaved pathways must cut frames by each, or by every and others")
        padded = any(path.pad for path in self.pathways)
        if padded and (self.interleaved or any(separator.where != "end" for separator in self.separators)):
            raise LayoutError("a padded pathway allows neither interleaved nor separators, except at the end")
        options = [*map(str, self.separators)]
        if self.interleaved:
            options.append("interleaved")
        if self.stage == "before":
            options.append("before")
        if self.canvas:
            options.append("canvas{}x{}".format(*self.canvas))
        if not all(map(_OPTION.fullmatch, options)) or (self.canvas and 0 in self.canvas):
            raise LayoutError(f"unknown part of a layout among {', '.join(options)}: write newline@row or canvas3x2")
        object.__setattr__(self, "_string", ";".join(["+".join(map(str, self.pathways)), *options]))

    @classmethod
    def parse(cls, layout: str) -> Pathways:
        """The layout of a text of this form. Raises LayoutError if it has another form."""
        return _parse_pathways(layout)

    def __str__(self) -> str:
        return self._string


@lru_cache(maxsize=256)
def _parse_pathways(layout: str) -> Pathways:
    paths, *options = layout.split(";")
    parts = paths.split("+")
    matches = [match for part in parts if (match := _PATHWAY.fullmatch(part))]
    if len(matches) < len(parts):
        raise LayoutError(f"unknown layout {layout!r}: write its pathways like {_EXAMPLE}")
    given: dict[str, Any] = {"separators": ()}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            known = "interleaved, before, newline@row or canvas3x2"
            raise LayoutError(f"unknown option {option!r} of a layout: write {known}")
        interleaved, before, name, where, rows, cols = match.groups()
        if name:
            given["separators"] += (Separator(name, cast(Place, where)),)
        elif rows:
            given["canvas"] = int(rows), int(cols)
        elif interleaved:
            given["interleaved"] = True
        else:
            given["stage"] = before
    return Pathways(tuple(map(_pathway, matches)), **given)


def _pathway(match: re.Match[str]) -> Pathway:
    name, frames, rows, cols, reduce, flat, class_token, pad = match.groups()
    rules = _axis_rule(frames), _axis_rule(rows), _axis_rule(cols)
    return Pathway(name, *rules, cast(Reduction, reduce), flat is not None, class_token is not None, int(pad or 0))


def _axis_rule(text: str) -> AxisRule:
    rule = text.rstrip("0123456789")
    return AxisRule(cast(Rule, rule), int(text[len(rule) :] or 1))


def _check_pathway(path: Pathway) -> None:
    sizes = (bins.size for bins in (path.frames, path.rows, path.cols))
    counted = all(is_count(size, least=1) for size in sizes) and is_count(path.pad, least=0)
    if not counted or not _PATHWAY.fullmatch(str(path)):
        raise LayoutError(f"unknown pathway {str(path)!r}: write it like {_EXAMPLE}")
    rules = {path.rows.rule, path.cols.rule}
    if "linear" in rules and (rules != {"linear"} or path.reduce != "mean" or path.flat):
        raise LayoutError(f"pathway {path.name}: linear must cut both rows and columns, reduced by mean, not flat")
    if path.class_token and (rules != {"each"} or path.flat):
        raise LayoutError(f"pathway {path.name}: the class token needs rows and columns cut by each, not flat")
