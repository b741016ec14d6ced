"""SlowFast-LLaVA under vLLM and lmms-eval, which find it by entry points: nothing here is imported before they ask."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

_TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_FAMILIES = tuple(sorted(path.stem for path in _TEMPLATES.glob("*.jinja")))


def chat_template(family: str) -> Path:
    """The chat template of a prompt family, a file for vLLM's --chat-template.

    A first message of a video and a question becomes the prompt of `prompts.build_prompt`, behind BOS where the family
    has it. Raises InputError for a family that has no template.
    """
    if family not in TEMPLATE_FAMILIES:
        raise InputError(f"no chat template for {family!r}: choose one of {', '.join(TEMPLATE_FAMILIES)}")
    return _TEMPLATES / f"{family}.jinja"
