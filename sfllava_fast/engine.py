"""The whole system: a video and a question in, an answer out.

frames -> CLIP, stopped at the layer that is read -> projector -> aggregator, straight into the rows of
`inputs_embeds` -> language model. SlowFast-LLaVA (arXiv 2407.15841) on the stock transformers models.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backends import choose
from .checkpoint import Checkpoint, load_checkpoint, rope_type
from .config import SlowFastConfig, sample_frames
from .errors import CheckpointError, ContextError, InputError
from .ops import slowfast_aggregate
from .prompts import (
    TEMPLATES,
    Prompt,
    build_prompt,
    check_family,
    pick_option,
    prompt_family,
    unknown_words,
)

if TYPE_CHECKING:
    from transformers import Cache

    from .video import Video

log = logging.getLogger("sfllava_fast")

DEFAULT_FRAMES = 50
DEFAULT_NEW_TOKENS = 128
# Frames in one pass of the vision tower: enough to fill a GPU, few enough to bound its activations.
FRAMES_PER_PASS = 16


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about; times in seconds, frames as indices into the video.

    option is the index of the choice that the text names (None: none, or no choices were given). tokens
    counts the video's tokens by pathway. tokens_per_second is the rate of the generate stage, None where
    one token was enough.
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
    attention: str
    dtype: str
    device: str
    prompt_tokens: int
    token_ids: list[int]
    seconds: dict[str, float]
    tokens_per_second: float | None
    choices: list[str] | None = None
    option: int | None = None

    @property
    def choice(self) -> str | None:
        """The choice that the text names."""
        return self.choices[self.option] if self.choices and self.option is not None else None

    def to_json(self) -> dict[str, Any]:
        """The answer as an object for json.dumps; the text is under "answer"."""
        fields = asdict(self)
        return {"answer": fields.pop("text"), **fields}


class Stopwatch:
    """Seconds by stage, measured with the device idle at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class SlowFastLlava:
    """A LLaVA checkpoint that answers questions about videos; load one with `from_pretrained`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: str | SlowFastConfig | None = None,
        backend: str = "auto",
        prompt: str = "auto",
    ) -> None:
        from .preprocess import PreprocessSpec

        options = checkpoint.options or {}
        text = checkpoint.model.config.text_config
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.device, self.dtype = self.model.device, self.model.dtype
        self.layout = SlowFastConfig.parse(layout or options.get("layout") or SlowFastConfig())
        self.frames = options.get("frames", DEFAULT_FRAMES)
        self.max_new_tokens = self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        self.backend = choose(
            backend, torch.empty(1, 1, text.hidden_size, dtype=self.dtype, device=self.device)
        ).name
        self.preprocess_spec = PreprocessSpec.from_processor(checkpoint.preprocessor)
        side = self.model.config.vision_config.image_size
        made = self.preprocess_spec.crop or self.preprocess_spec.resized(side, side)
        if made != (side, side):
            raise CheckpointError(
                f"the image processor makes {made[1]}x{made[0]} pictures and the vision tower takes "
                f"{side}x{side}: set size and crop_size in preprocessor_config.json"
            )
        self.prompt_family = (
            prompt_family(
                text.model_type,
                checkpoint.chat_template,
                self.tokenizer.get_vocab(),
                checkpoint.options,
            )
            if prompt == "auto"
            else check_family(prompt)
        )
        self.stop_ids, self.stop_text = self._find_stops()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        layout: str | SlowFastConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        attention: str = "auto",
        prompt: str = "auto",
    ) -> SlowFastLlava:
        """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint in Hugging Face format; None is the embedded model.

        layout: None takes the checkpoint's own default, else the paper's. dtype, device: None is float32 on
        a CPU and the checkpoint's 16 bits on a GPU, which is taken where there is one. backend: of the
        aggregator, by name or "auto". attention: "auto", "eager", "sdpa" or "flash_attention_2". prompt:
        "auto" or one of `prompts.FAMILIES`.

        Raises CheckpointError, LayoutError, BackendError or InputError.
        """
        if path_or_hub_id is None:
            from .embedded import model_dir

            checkpoint = replace(load_checkpoint(model_dir(), dtype, device, attention), name="embedded")
        else:
            checkpoint = load_checkpoint(path_or_hub_id, dtype, device, attention)
        return cls(checkpoint, layout, backend, prompt)

    @torch.inference_mode()
    def answer(
        self,
        video: str | Path | Video,
        question: str,
        frames: int | None = None,
        decoder: str = "pyav",
        max_new_tokens: int | None = None,
        choices: Sequence[str] | None = None,
        on_token: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about a video, greedily.

        video: a file, a folder of frames, or an opened Video. frames: how many to sample (fewer where the
        video is shorter). max_new_tokens: None takes the checkpoint's, else 128. choices: makes it multiple
        choice. on_token: called with each piece of text as it is generated.

        Raises VideoError, InputError, LayoutError, ContextError or BackendError, before any computation
        where possible.
        """
        frames = self.frames if frames is None else frames
        max_new_tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        for name, count in (("frames", frames), ("max_new_tokens", max_new_tokens)):
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name} must be an integer of at least 1, not {count!r}")
        clock = Stopwatch(self.device)
        prompt = self.prompt(question, choices)
        with clock("decode"):
            clip = self.open(video, decoder)
            indices = sample_frames(clip.total, frames)
            plan = self.layout.plan(len(indices), self.checkpoint.grid)
            self.check_context(prompt, plan.tokens["total"], len(indices), max_new_tokens)
            pictures = clip.frames(indices)
        embeds, video_rows = self.allocate(prompt, plan.tokens["total"])
        self.write_video(pictures, video_rows, clock)
        with clock("prefill"):
            self.write_text(prompt, embeds)
            cache = self.new_cache()
            logits = self.prefill(embeds, cache)
        with clock("generate"):
            ids = self.generate(logits, cache, max_new_tokens, on_token)
        text = self.decode_text(ids)
        option = pick_option(text, choices) if choices is not None else None
        steps, seconds = len(ids) - 1, clock.seconds["generate"]
        return Answer(
            text=text,
            video=str(video if isinstance(video, (str, os.PathLike)) else clip.path),
            question=question,
            model=self.checkpoint.name,
            layout=str(self.layout),
            frames=indices,
            slow_frames=[indices[i] for i in plan.slow_frames],
            tokens=dict(plan.tokens),
            backend=self.backend,
            attention=self.checkpoint.attention.describe(),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            prompt_tokens=len(prompt),
            token_ids=ids,
            seconds=clock.seconds,
            tokens_per_second=steps / seconds if steps else None,
            choices=[str(choice) for choice in choices] if choices is not None else None,
            option=option,
        )

    def prompt(self, question: str, choices: Sequence[str] | None = None) -> Prompt:
        """The prompt of a question, in this checkpoint's family; warns about words it does not know."""
        prompt = build_prompt(
            question, self.tokenizer, self.prompt_family, choices, self.checkpoint.chat_template
        )
        rows = self.model.get_input_embeddings().num_embeddings
        if max(prompt.before + prompt.after, default=0) >= rows:
            raise CheckpointError(
                f"the tokenizer has tokens beyond the model's {rows}: they do not belong together"
            )
        unknown = unknown_words(" ".join([question, *map(str, choices or ())]), self.tokenizer)
        if unknown:
            log.warning("the model does not know these words and cannot use them: %s", ", ".join(unknown))
        return prompt

    def open(self, video: str | Path | Video, decoder: str = "pyav") -> Video:
        """The video, opened; an opened one comes back as it is."""
        if not isinstance(video, (str, os.PathLike)):
            return video
        from .video import open_video

        return open_video(video, decoder=decoder)

    def check_context(self, prompt: Prompt, video_tokens: int, frames: int, max_new_tokens: int) -> None:
        """Raise ContextError where prompt, video and answer together exceed the language model's context."""
        total, context = len(prompt) + video_tokens + max_new_tokens, self.checkpoint.context
        if total > context:
            raise ContextError(
                f"{video_tokens} video tokens + {len(prompt)} of prompt + {max_new_tokens} new = {total} "
                f"exceed the context of {context}: lower frames (now {frames}), max_new_tokens, or take a "
                f"smaller layout than {self.layout}"
            )

    def allocate(self, prompt: Prompt, video_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An empty inputs_embeds [1, S, D] for prompt and video, and the video's rows in it [S', D]."""
        width = self.model.config.text_config.hidden_size
        embeds = torch.empty(1, len(prompt) + video_tokens, width, dtype=self.dtype, device=self.device)
        start = len(prompt.before)
        return embeds, embeds[0, start : start + video_tokens]

    def write_video(self, pictures: torch.Tensor, rows: torch.Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens of pictures, uint8 [T, H, W, 3]."""
        from .preprocess import preprocess

        with clock("preprocess"):
            pixels = preprocess(pictures, self.preprocess_spec, self.dtype, self.device)
        with clock("vision"):
            patches = self.encode(pixels)
        with clock("projector"):
            features = self.project(patches)
        with clock("aggregate"):
            slowfast_aggregate(
                features, self.layout, out=rows, backend=self.backend, grid=self.checkpoint.grid
            )

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch features [T, N, C] of pixel values [T, 3, h, w]: `hidden_states[vision_feature_layer]`."""
        parts = [self._run_tower(part) for part in pixels.split(FRAMES_PER_PASS)]
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hidden[:, 1:] if self.checkpoint.drops_first else hidden

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features [T, N, C] as the language model's embeddings [T, N, D], by the stock projector."""
        return self.model.model.multi_modal_projector(patches)

    def write_text(self, prompt: Prompt, embeds: torch.Tensor) -> None:
        """Fill inputs_embeds [1, S, D] before and after the video with the prompt's embeddings."""
        ids = torch.tensor([*prompt.before, *prompt.after], device=self.device)
        text = self.model.get_input_embeddings()(ids)
        before, after = len(prompt.before), len(prompt.after)
        embeds[0, :before] = text[:before]
        embeds[0, embeds.shape[1] - after :] = text[before:]

    def new_cache(self) -> Cache:
        """An empty key/value cache for one conversation."""
        from transformers import DynamicCache

        language_model = self.model.model.language_model
        if rope_type(language_model.config) == "dynamic":
            # It remembers the scale of the longest input it saw; a short input makes it forget.
            first = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            language_model.rotary_emb(torch.empty(1, dtype=self.dtype, device=self.device), first)
        return DynamicCache(config=language_model.config)

    def prefill(self, embeds: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [V] after the last of embeddings [1, S, D], which are appended to the cache."""
        return self.model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]

    def generate(
        self,
        logits: torch.Tensor,
        cache: Cache,
        max_new_tokens: int,
        on_token: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Greedy token ids from the logits [V] of a prefill on, up to a stop (included) or max_new_tokens."""
        ids: list[int] = []
        text, shown = "", 0
        for token in self._tokens(logits, cache, max_new_tokens):
            ids.append(token)
            text = self.decode_text(ids, strip=False) if on_token is not None else ""
            # A character may span tokens: what is not decodable yet waits.
            if len(text) > shown and not text.endswith("\ufffd"):
                on_token(text[shown:])
                shown = len(text)
        if len(text) > shown:
            on_token(text[shown:])
        return ids

    def decode_text(self, ids: Sequence[int], strip: bool = True) -> str:
        """The text of generated token ids, without special tokens and up to the family's stop text."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        if self.stop_text:
            text = text.partition(self.stop_text)[0]
        return text.strip() if strip else text

    def _tokens(self, logits: torch.Tensor, cache: Cache, max_new_tokens: int) -> Iterator[int]:
        ids: list[int] = []
        while True:
            ids.append(int(logits.argmax()))
            yield ids[-1]
            if ids[-1] in self.stop_ids or len(ids) == max_new_tokens or self._says_stop(ids):
                return
            step = torch.tensor([ids[-1:]], device=self.device)
            logits = self.model(
                input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[0, -1]

    def _run_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        tower, depths = self.model.model.vision_tower, self.checkpoint.depths
        if len(depths) == 1:
            return tower(pixels).last_hidden_state
        states = tower(pixels, output_hidden_states=True).hidden_states
        return torch.cat([states[depth] for depth in depths], dim=-1)

    def _find_stops(self) -> tuple[frozenset[int], str | None]:
        """Token ids that end an answer, and a text that does where it is no token of its own."""
        named = [self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        ids = {i for eos in named if eos is not None for i in (eos if isinstance(eos, list) else [eos])}
        template = TEMPLATES.get(self.prompt_family)
        stop = template.stop if template else None
        if stop in self.tokenizer.get_vocab():
            ids.add(self.tokenizer.convert_tokens_to_ids(stop))
        return frozenset(ids), stop

    def _says_stop(self, ids: list[int]) -> bool:
        return bool(self.stop_text) and self.stop_text in self.tokenizer.decode(
            ids[-16:], skip_special_tokens=True
        )
