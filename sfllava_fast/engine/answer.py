"""An answer, and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer to a question about a video.

    Attributes:
        text: The answer.
        video: Path or name of the video.
        question: The question.
        model: The checkpoint, as it was named.
        layout: The layout, as text.
        frames: Indices of the sampled frames.
        slow_frames: Indices of the slow pathway's frames.
        tokens: The video's tokens by pathway, and their total.
        backend: Of the aggregator.
        projector: "exact", "commuted" or "auto".
        attention: The attention kernel.
        dtype: Of the weights.
        device: Of the weights.
        prompt_tokens: Tokens of the prompt without the video.
        token_ids: Token ids of the answer.
        seconds: Seconds by stage (`stages.STAGES`); a stage that an earlier question ran is missing.
        ttft: Seconds from the question to the answer's first token.
        tokens_per_second: Rate of the stage generate; None for an answer of one token.
        choices: The choices of a multiple-choice question, else None.
        option: Index of the choice that the text names; None if it names none.
        caveat: The checkpoint's caveat about its answers to this video, or None.
        reduction: The reduction, as text, or None.
        kept: Video tokens in the layer of the KV cache that holds the fewest.
        damage: What is missing of a damaged video, or None.
    """

    text: str
    video: str
    question: str
    model: str
    layout: str
    frames: list[int]
    slow_frames: list[int]
    tokens: dict[str, int]
    backend: str
    projector: str
    attention: str
    dtype: str
    device: str
    prompt_tokens: int
    token_ids: list[int]
    seconds: dict[str, float]
    ttft: float
    tokens_per_second: float | None
    choices: list[str] | None = None
    option: int | None = None
    caveat: str | None = None
    reduction: str | None = None
    kept: int | None = None
    damage: str | None = None

    @property
    def choice(self) -> str | None:
        """The choice that the text names."""
        return self.choices[self.option] if self.choices and self.option is not None else None

    def to_json(self) -> dict[str, Any]:
        """A dict for json.dumps, with the text as "answer" and the named choice as "choice"."""
        fields = asdict(self)
        return {"answer": fields.pop("text"), "choice": self.choice, **fields}
