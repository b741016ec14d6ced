"""A loaded model: the parts that its sessions share."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, check_count
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..layouts.presets import choose_layout
from ..model.checkpoint import Checkpoint
from ..model.prompts import Prompt
from ..model.shipped import is_sample
from ..model.weights import hash_weights
from .exclusive import Exclusive
from .options import ModelOptions
from .prompt_format import PromptFormat, TextStream
from .session_pool import SessionPool
from .video_encoder import VideoEncoder

if TYPE_CHECKING:
    from ..model.generation import LanguageModel
    from ..model.kv_cache import KvCache
    from ..reduction.prefilling import Prefilling

log = logging.getLogger("sfllava_fast")

DEFAULT_NEW_TOKENS = 128


@dataclass(eq=False, repr=False)
class Pipeline:
    """The parts of a loaded model, and what takes several of them.

    Attributes:
        checkpoint: What was loaded.
        encoder: Frames to the video's tokens.
        language: The language model.
        prefilling: What of a video goes into the KV cache.
        prompts: Questions to prompts, token ids to answers.
        frames: Frames that are sampled if the caller names no number.
        sessions: The KV caches in memory.
        exclusive: Which thread may run the model now.
    """

    checkpoint: Checkpoint
    encoder: VideoEncoder
    language: LanguageModel
    prefilling: Prefilling
    prompts: PromptFormat
    frames: int
    sessions: SessionPool
    exclusive: Exclusive = field(default_factory=Exclusive)
    warned: set[str] = field(default_factory=set)

    @classmethod
    def build(cls, checkpoint: Checkpoint, options: ModelOptions, embedded: bool = False) -> Pipeline:
        """The pipeline of a checkpoint.

        Args:
            checkpoint: The stock model and what belongs to it.
            options: How it runs.
            embedded: Whether it is the embedded model, whose learned reductions are in the package.
        """
        from ..model.generation import LanguageModel
        from ..reduction.prefilling import make_prefilling

        layout, frames = choose_layout(options.layout, checkpoint.options)
        language = LanguageModel(checkpoint.model, checkpoint.attention)
        return cls(
            checkpoint,
            VideoEncoder(checkpoint, layout, options.backend, options.projector, options.separators),
            language,
            # A reduction changes the model: everything that can fail comes before it.
            prompts=PromptFormat(checkpoint, options.prompt),
            frames=frames,
            sessions=SessionPool(options.max_sessions, options.max_session_bytes),
            prefilling=make_prefilling(options.reduction, language, checkpoint.model, checkpoint.context, embedded),
        )

    def with_layout(self, layout: str | Layout) -> Pipeline:
        """This pipeline in another layout. Everything else is shared, the sessions too."""
        encoder = self.encoder.with_layout(layout)
        return replace(self, encoder=encoder, frames=encoder.layout.frames or self.frames)

    @property
    def layout(self) -> Layout:
        return self.encoder.layout

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def close(self) -> None:
        """Undo the reduction and release all KV caches. No session of a closed pipeline can be asked anything."""
        with self.exclusive.taken():
            for session in self.sessions:
                session.release()
            self.sessions.spare = None
            self.prefilling.undo()

    def check_open(self) -> None:
        """Raise InputError if the pipeline is closed."""
        if self.prefilling.undone:
            raise InputError("the model is closed: load it again")

    def new_tokens(self, count: int | None) -> int:
        """How many tokens to generate at most; None: the checkpoint's number, else 128."""
        if count is None:
            return self.checkpoint.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        check_count("max_new_tokens", count)
        return count

    def plan(self, frames: int) -> Plan:
        """The layout's plan of a video of `frames` sampled frames."""
        return self.encoder.plan(frames)

    def check_context(self, prompt: Prompt, video_tokens: int, frames: int, max_new_tokens: int) -> None:
        """Raise ContextError if prompt, video and answer together exceed the language model's context."""
        remedy = f"lower frames (now {frames}), max_new_tokens, or take a smaller layout than {self.layout}"
        self.prefilling.check_context(len(prompt), video_tokens, max_new_tokens, remedy)

    def allocate(self, before: int, video_tokens: int) -> tuple[Tensor, Tensor]:
        """Empty embeddings [1, P, D] of a prompt's start and a video, and the video's rows in them."""
        encoder = self.encoder
        embeds = torch.empty(1, before + video_tokens, encoder.width, dtype=encoder.dtype, device=encoder.device)
        return embeds, embeds[0, before:]

    def generate(
        self,
        cache: KvCache,
        logits: Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        on_token: Callable[[str], None] | None = None,
    ) -> list[list[int]]:
        """Generate greedily.

        Args:
            cache: Keys and values of the prompts, a row each.
            logits: [rows, V] after each prompt.
            lengths: Tokens of each row in the cache.
            max_new_tokens: Where an answer is cut.
            on_token: Called with each piece of the first row's text.

        Returns:
            The token ids of each row, with the one that ended it.
        """
        rows: list[list[int]] = [[] for _ in lengths]
        running = set(range(len(rows)))
        stream = None if on_token is None else TextStream(self.prompts, on_token)
        for ids in self.language.tokens(cache, logits, lengths, max_new_tokens):
            for row in sorted(running):
                rows[row].append(ids[row])
                if self.prompts.ends(rows[row]):
                    running.remove(row)
            if stream:
                stream.update(rows[0])
            if not running:
                break
        if stream:
            stream.finish()
        return rows

    def caveat(self, video: str) -> str | None:
        """The checkpoint's caveat about answers to this video, if it has one."""
        caveat = (self.checkpoint.options or {}).get("caveat")
        return None if not caveat or is_sample(video) else str(caveat)

    def warn_once(self, text: str | None) -> None:
        """Log a warning, the first time."""
        if text and text not in self.warned:
            self.warned.add(text)
            log.warning("%s", text)

    def fingerprint(self) -> str:
        """A hash of everything that decides the video's keys and values: config, dtype, separators, preprocessing,
        prompts, reduction and all weights (see `hash_weights`)."""
        model, encoder, prompts = self.checkpoint.model, self.encoder, self.prompts
        config = _without_path(model.config.to_dict())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        separators = [] if encoder.separators is None else [("separators", encoder.separators)]
        hash_weights(digest, [*model.state_dict().items(), *separators])
        shown = encoder.preprocess_spec, prompts.family, self.checkpoint.chat_template, prompts.asks_openly
        digest.update(f"{encoder.dtype} {encoder.projector} {self.prefilling.fingerprint()} {shown}".encode())
        return digest.hexdigest()


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folder it was loaded from: a checkpoint that was moved is the same one."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: _without_path(value) if isinstance(value, dict) else value for key, value in kept.items()}
