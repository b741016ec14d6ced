"""The stages of an answer.

frames -> CLIP, stopped at the layer that is read -> projector -> aggregator, straight into the rows of
`inputs_embeds` -> language model. SlowFast-LLaVA (arXiv 2407.15841) on the stock transformers models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ContextError, InputError, RenumberedError, check_count
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..layouts.presets import parse_layout
from ..layouts.sampling import DEFAULT_FRAMES
from ..layouts.slowfast import SlowFastLayout
from ..model.checkpoint import Checkpoint
from ..model.out_of_memory import is_out_of_memory
from ..model.prompts import (
    TEMPLATES,
    Prompt,
    Turn,
    build_prompt,
    check_family,
    format_options,
    pick_option,
    prompt_family,
    same_choice,
    unknown_words,
)
from ..model.separator_vectors import find_separators
from ..model.shipped import is_sample
from ..model.tower import FRAMES_PER_PASS
from ..model.weights import hash_weights
from ..ops.aggregate import slowfast_aggregate
from ..ops.backends.aggregate import choose
from ..ops.projector import Mode, check_mode, project_and_aggregate, why_layout_not_commuted, why_not_commuted
from ..video import Video
from ..video.canvas import CanvasVideo
from .exclusive import Exclusive
from .session_pool import DEFAULT_SESSIONS, SessionPool
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from ..reduction.prefilling import Reduction
    from ..video.preprocess import PreprocessSpec

log = logging.getLogger("sfllava_fast")

DEFAULT_NEW_TOKENS = 128
_LARGEST = 16  # times the tower's pictures: what frames are resized to, before they are cropped
_PASS_BYTES = 64 << 20  # activations of a pass on a CPU, where a small tower takes more frames


class Pipeline:
    """A checkpoint's stages, each a method, and the settings that they share.

    exclusive: whose thread may run them now.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: str | Layout | None = None,
        backend: str = "auto",
        prompt: str = "auto",
        projector: Mode = "exact",
        max_sessions: int = DEFAULT_SESSIONS,
        max_session_bytes: int | None = None,
        separators: Mapping[str, Tensor] | None = None,
        reduction: str | Reduction | None = None,
        home: Path | None = None,
    ) -> None:
        from ..model.generation import LanguageModel
        from ..reduction.prefilling import make_prefilling
        from ..video.preprocess import PreprocessSpec

        options = checkpoint.options or {}
        text = checkpoint.model.config.text_config
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.device, self.dtype = self.model.device, self.model.dtype
        self.language = LanguageModel(self.model, checkpoint.attention)
        self.sessions, self.exclusive = SessionPool(max_sessions, max_session_bytes), Exclusive()
        self.frames_per_pass = self._frames_that_fit()
        check_mode(projector)
        self.projector: Mode = projector
        self.frames = options.get("frames", DEFAULT_FRAMES)
        self._take_layout(layout or options.get("layout") or SlowFastLayout(), separators)
        self.max_new_tokens = self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        self.backend = choose(backend, torch.empty(1, 1, text.hidden_size, dtype=self.dtype, device=self.device)).name
        side = self.model.config.vision_config.image_size
        self.preprocess_spec = _read_spec(PreprocessSpec, checkpoint.preprocessor, side)
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
        # A model that was trained without choices in its prompts; the choice that its answer is, is picked.
        self.asks_openly = options.get("choices") == "open"
        self._caveat, self._said = options.get("caveat"), set()
        self.stop_ids, self.stop_text = self._find_stops()
        # Last, since it may change the model.
        self.prefilling = make_prefilling(reduction, self.language, self.model, checkpoint.context, home)

    def with_layout(self, layout: str | Layout) -> Pipeline:
        """This model in another layout; everything else, sessions among it, is shared."""
        other = copy(self)
        other._take_layout(layout)
        return other

    def _take_layout(self, layout: str | Layout, separators: Mapping[str, Tensor] | None = None) -> None:
        """Set the layout and what follows from it: separators, and of a preset the frames."""
        self.layout = parse_layout(layout)
        if self.layout.class_token and not self.checkpoint.drops_first:
            raise InputError(f"{layout} reads the class token, which this model's vision tower does not have")
        if self.projector == "commuted":
            reason = why_not_commuted(self.model.model.multi_modal_projector) or why_layout_not_commuted(self.layout)
            if reason:
                raise InputError(f"this model's projector cannot be commuted with pooling: {reason}; use exact or auto")
        self.separators = find_separators(self.layout.separators, self.checkpoint, separators)
        self.frames = self.layout.frames or self.frames

    def close(self) -> None:
        """Put the transformers model back as it was without the reduction. A closed model can be asked nothing."""
        with self.exclusive.taken():
            for session in self.sessions:
                session.release()
            self.sessions.spare = None
            self.prefilling.undo()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_new_tokens(self, count: int | None) -> int:
        """How many tokens to generate at most."""
        count = self.max_new_tokens if count is None else count
        check_count("max_new_tokens", count)
        return count

    def prompt(self, question: str, choices: Sequence[str] | None = None, turns: Sequence[Turn] = ()) -> Prompt:
        """The prompt of a question, in this checkpoint's family; warns about words it does not know."""
        if self.prefilling.undone:
            raise InputError("the model is closed: load it again")
        prompt = self._build_prompt(question, choices, turns)
        rows = self.model.get_input_embeddings().num_embeddings
        if max(prompt.before + prompt.after, default=0) >= rows:
            raise CheckpointError(f"the tokenizer has tokens beyond the model's {rows}: they do not belong together")
        seen = [] if self.asks_openly else map(str, choices or ())
        unknown = unknown_words(" ".join([question, *seen]), self.tokenizer)
        if unknown:
            log.warning("the model does not know these words and cannot use them: %s", ", ".join(unknown))
        return prompt

    def pick_option(self, text: str, choices: Sequence[Any]) -> int | None:
        """Index of the choice that an answer names; None where it names none."""
        return (same_choice if self.asks_openly else pick_option)(text, choices)

    def caveat_about(self, video: str) -> str | None:
        """What is to be said with answers about a video; None for nothing."""
        if not self._caveat or is_sample(video):
            return None
        return str(self._caveat)

    def say_once(self, caveat: str | None) -> None:
        """Warn of it, the first time."""
        if caveat and caveat not in self._said:
            self._said.add(caveat)
            log.warning("%s", caveat)

    def plan(self, frames: int) -> Plan:
        """What the layout does to a video of so many sampled frames."""
        return self.layout.plan(self.layout.count_pictures(frames), self.checkpoint.grid)

    def shortest_prompt(self) -> Prompt:
        """That of a question of one character: what every question costs, and what stands before the video."""
        return self._build_prompt("?")

    def check_context(self, prompt: Prompt, video_tokens: int, frames: int, max_new_tokens: int) -> None:
        """Raise ContextError where prompt, video and answer together exceed the language model's context."""
        video_tokens, context = video_tokens + self.prefilling.adds, self.prefilling.context
        total = len(prompt) + video_tokens + max_new_tokens
        if total > context:
            raise ContextError(
                f"{video_tokens} video tokens + {len(prompt)} of prompt + {max_new_tokens} new = {total} "
                f"exceed the context of {context}: lower frames (now {frames}), max_new_tokens, or take a "
                f"smaller layout than {self.layout}"
            )

    def allocate(self, before: int, video_tokens: int) -> tuple[Tensor, Tensor]:
        """Empty embeddings [1, P, D] of so many prompt tokens and the video's, and the video's rows in them."""
        width = self.model.config.text_config.hidden_size
        embeds = torch.empty(1, before + video_tokens, width, dtype=self.dtype, device=self.device)
        return embeds, embeds[0, before:]

    def write_video(self, clip: Video, frames: Sequence[int], rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens of these frames."""
        try:
            parts = self._encode_frames(clip, frames, clock)
        except RenumberedError:  # damage shows late which frames there are: now their numbers are known
            parts = self._encode_frames(clip, frames, clock)
        with clock("projector"):
            patches = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            if self.projector != "exact" and self.layout.stage == "after":
                self._project_and_aggregate(patches, rows)
                return
            features = self._project_first(patches)
        self.write_tokens(features, rows, clock)

    def write_tokens(self, features: Tensor, rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens of what `features` makes."""
        with clock("aggregate"):
            if self.layout.stage == "before":
                self._project_and_aggregate(features, rows)
                return
            slowfast_aggregate(
                features,
                self.layout,
                out=rows,
                backend=self.backend,
                grid=self.checkpoint.grid,
                separators=self.separators,
            )

    def _encode_frames(self, clip: Video, frames: Sequence[int], clock: Stopwatch) -> list[Tensor]:
        """Patch features of these frames, in parts [t, N, C]; on a GPU decoding goes on while the tower runs."""
        from ..video.pixels import load_pixels

        if self.layout.canvas:
            clip = CanvasVideo(clip, frames, *self.layout.canvas)
            frames = range(clip.total)
        parts = []
        passes = math.ceil(len(frames) / min(self.frames_per_pass, FRAMES_PER_PASS))
        batch = math.ceil(len(frames) / passes)  # alike: a pass of two frames takes as long as one of several
        with load_pixels(clip, frames, self.preprocess_spec, self.dtype, self.device, batch) as pixels:
            batches = iter(pixels)
            if self.device.type == "cpu":  # decoding has its cores: a tower beside it only slows both
                with clock("wait"):
                    batches = _joined(list(batches), max(1, self.frames_per_pass // batch))
            while True:
                with clock("wait"):
                    batch = next(batches, None)
                if batch is None:
                    break
                with clock("vision"):
                    parts.append(self.encode(batch))
        clock.add("decode", pixels.decode_seconds)
        clock.add("preprocess", pixels.preprocess_seconds)
        return parts

    def encode(self, pixels: Tensor) -> Tensor:
        """Patch features [T, N, C] of pixel values [T, 3, h, w]: `hidden_states[vision_feature_layer]`, with the class
        token where the layout reads it.

        Runs `frames_per_pass` frames at a time, and from then on half of that where they do not fit in memory.
        """
        while True:
            try:
                parts = [self._run_tower(part) for part in pixels.split(self.frames_per_pass)]
                break
            except RuntimeError as error:
                if self.frames_per_pass == 1 or not is_out_of_memory(error):
                    raise
            self.frames_per_pass = min(self.frames_per_pass, len(pixels)) // 2 or 1
            log.warning("out of memory in the vision tower: going on with %d frames a pass", self.frames_per_pass)
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hidden[:, 1:] if self.checkpoint.drops_first and not self.layout.class_token else hidden

    def project(self, patches: Tensor) -> Tensor:
        """Patch features [T, N, C] as the language model's embeddings [T, N, D], by the stock projector."""
        return self.model.model.multi_modal_projector(patches)

    def _project_first(self, patches: Tensor) -> Tensor:
        return patches if self.layout.stage == "before" else self.project(patches)

    def _build_prompt(self, question: str, choices: Sequence[str] | None = None, turns: Sequence[Turn] = ()) -> Prompt:
        template = self.checkpoint.chat_template
        if self.asks_openly and choices is not None:
            format_options(choices)  # raises what is wrong with them
        if self.asks_openly:
            choices, turns = None, [Turn(turn.question, turn.answer) for turn in turns]
        return build_prompt(question, self.tokenizer, self.prompt_family, choices, template, turns)

    def _project_and_aggregate(self, patches: Tensor, rows: Tensor) -> None:
        project_and_aggregate(
            patches,
            self.model.model.multi_modal_projector,
            self.layout,
            mode=self.projector,
            out=rows,
            backend=self.backend,
            grid=self.checkpoint.grid,
            separators=self.separators,
        )

    def features(self, frames: Tensor, clock: Stopwatch) -> Tensor:
        """What is pooled of frames in memory, uint8 RGB [T, H, W, 3]: [T, N, D] that the projector made, or patch
        features [T, N, C] where the layout pools before it."""
        from ..video.preprocess import preprocess

        with clock("preprocess"):
            pixels = preprocess(frames, self.preprocess_spec, self.dtype, self.device)
        with clock("vision"):
            patches = self.encode(pixels)
        with clock("projector"):
            return self._project_first(patches.contiguous())

    def generate(
        self,
        cache: KvCache,
        logits: Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        on_token: Callable[[str], None] | None = None,
    ) -> list[list[int]]:
        """Greedy token ids from the logits [rows, V] of each row, up to a stop (included) or max_new_tokens.

        on_token: called with the pieces of the first row's text.
        """
        rows: list[list[int]] = [[] for _ in lengths]
        going = set(range(len(rows)))
        teller = _Teller(self, on_token)
        for ids in self.language.tokens(cache, logits, lengths, max_new_tokens):
            for row in sorted(going):
                rows[row].append(ids[row])
                if ids[row] in self.stop_ids or self._says_stop(rows[row]):
                    going.remove(row)
            teller.tell(rows[0])
            if not going:
                break
        teller.finish()
        return rows

    def decode_text(self, ids: Sequence[int], strip: bool = True) -> str:
        """The text of generated token ids, without special tokens and up to the family's stop text."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        if self.stop_text:
            text = text.partition(self.stop_text)[0]
        return text.strip() if strip else text

    def fingerprint(self) -> str:
        """Tells models apart: their config, dtype, separators, preprocessing and prompts, and all of their weights (see
        `hash_weights`)."""
        config = _without_path(self.model.config.to_dict())
        told = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        separators = [] if self.separators is None else [("separators", self.separators)]
        hash_weights(told, [*self.model.state_dict().items(), *separators])
        shown = self.preprocess_spec, self.prompt_family, self.checkpoint.chat_template, self.asks_openly
        told.update(f"{self.dtype} {self.projector} {self.prefilling.fingerprint()} {shown}".encode())
        return told.hexdigest()

    def _frames_that_fit(self) -> int:
        """Frames in one pass of the vision tower, whose activations take at most a quarter of what memory is free.

        On a CPU small towers take more frames: the products of few are too small for its rate.
        """
        vision, (rows, columns) = self.model.config.vision_config, self.checkpoint.grid
        values = (rows * columns + 1) * (2 * vision.intermediate_size + 8 * vision.hidden_size)
        if self.device.type == "cpu":
            return max(FRAMES_PER_PASS, _PASS_BYTES // (values * self.dtype.itemsize))
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(FRAMES_PER_PASS, free // (4 * values * self.dtype.itemsize)))

    def _run_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        tower, depths = self.model.model.vision_tower, self.checkpoint.depths
        if len(depths) == 1:
            return tower(pixels).last_hidden_state
        states = tower(pixels, output_hidden_states=True).hidden_states
        return torch.cat([states[depth] for depth in depths], dim=-1)

    def _find_stops(self) -> tuple[frozenset[int], str | None]:
        """Token ids that end an answer, and a text that does where it is no token of its own."""
        named = [self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        ids = [i for eos in named if eos is not None for i in (eos if isinstance(eos, list) else [eos])]
        if not all(isinstance(i, int) for i in ids):
            raise CheckpointError(f"eos_token_id {named[0]!r} is no token id: correct generation_config.json")
        template = TEMPLATES.get(self.prompt_family)
        stop = template.stop if template else None
        if stop in self.tokenizer.get_vocab():
            ids.append(self.tokenizer.convert_tokens_to_ids(stop))
        return frozenset(ids), stop

    def _says_stop(self, ids: list[int]) -> bool:
        return bool(self.stop_text) and self.stop_text in self.tokenizer.decode(ids[-16:], skip_special_tokens=True)


def _read_spec(kind: type[PreprocessSpec], processor: dict[str, Any], side: int) -> PreprocessSpec:
    """A checkpoint's image processor, for a tower of pictures of this side. CheckpointError for one that cannot be."""
    try:
        spec = kind.from_processor(processor)
        most = max(spec.resized(side, side))
        if not isinstance(spec.rescale, (int, float)) or most > _LARGEST * side:
            raise TypeError(f"rescale_factor {spec.rescale!r}, frames resized to {most}")
    except TypeError as error:  # of a value that is no number, or no list of numbers
        raise CheckpointError(f"the image processor's settings cannot be used ({error}): correct them") from error
    return spec


class _Teller:
    """Passes the text of growing token ids on, piece by piece."""

    def __init__(self, model: Pipeline, on_token: Callable[[str], None] | None) -> None:
        self.model, self.on_token = model, on_token
        self.text, self.shown = "", 0

    def tell(self, ids: list[int]) -> None:
        if self.on_token is None:
            return
        self.text = self.model.decode_text(ids, strip=False)
        # A character may span tokens: what is not decodable yet waits.
        if not self.text.endswith("\ufffd"):
            self.finish()

    def finish(self) -> None:
        if len(self.text) > self.shown:
            self.on_token(self.text[self.shown :])
            self.shown = len(self.text)


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where it was loaded from: a checkpoint that was moved is the same one."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: _without_path(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _joined(batches: list[Tensor], count: int) -> Iterator[Tensor]:
    """The batches, `count` at a time as one."""
    for start in range(0, len(batches), count):
        few = batches[start : start + count]
        yield torch.cat(few) if len(few) > 1 else few[0]
