"""SlowFast-LLaVA in vLLM and lmms-eval, which load it lazily by entry points."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

_TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_FAMILIES = tuple(sorted(path.stem for path in _TEMPLATES.glob("*.jinja")))


def chat_template(family: str) -> Path:
    """The file with a prompt family's chat template, for vLLM's --chat-template.

    It turns a first message of a video and a question into the prompt of `prompts.build_prompt`, with BOS before it if
    the family has that.

    Raises:
        InputError: If the family has no template.
    """
    if family not in TEMPLATE_FAMILIES:
        raise InputError(f"no chat template for {family!r}: choose one of {', '.join(TEMPLATE_FAMILIES)}")
    return _TEMPLATES / f"{family}.jinja"
