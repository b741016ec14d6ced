"""An answer and how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about; times in seconds, frames as indices into the video.

    option is the index of the choice that the text names (None: none, or no choices were given). tokens counts the
    video's tokens by pathway. seconds is by stage (`stages.STAGES`): stages that a session had behind it are missing.
    ttft is from the question to its first token. tokens_per_second is the rate of the generate stage, None where one
    token was enough. caveat is what a checkpoint has to say about its answers, None for nothing: the embedded one says
    what it was trained on, with every video but the sample. reduction is its text, None without one; kept is how many
    of the video's tokens are in the language model's keys and values then, in the layers that hold fewest. damage is
    what is missing of the video, None for nothing that was noticed.
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
        """The answer as an object for json.dumps; the text is under "answer", what it chose under "choice"."""
        fields = asdict(self)
        return {"answer": fields.pop("text"), "choice": self.choice, **fields}
