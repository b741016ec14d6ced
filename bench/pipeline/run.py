"""The whole pipeline against the plain one: the same answers first, then paired rounds, stage by stage.

Ours, the plain pipeline and the device's ceilings are measured in turns in one process. The times are those that
`answer` and `open(...).ask(...)` report to any caller.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import util
from pathlib import Path

import torch
from torch import nn

from sfllava_fast import embedded
from sfllava_fast.engine.answer import Answer
from sfllava_fast.engine.options import ModelOptions
from sfllava_fast.engine.pipeline import Pipeline
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import InputError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.model import checkpoint as loading
from sfllava_fast.model.checkpoint import Checkpoint
from sfllava_fast.video import Video, open_video

from ..harness import peak_memory as memory
from ..harness.ceilings import Ceilings
from ..harness.progress import progress
from ..harness.record import folder_name, guarded, machine
from . import clip, costs
from .baseline import Baseline, PlainAnswer
from .dummy import NAMES, dummy_checkpoint
from .figures import BARS, COMPILED, FROM_FRAMES, OURS, PLAIN, SECOND, STAGES, WITH_DECODING, Bars, Times, figures

DEFAULT_FRAMES, DEFAULT_NEW_TOKENS, DEFAULT_ROUNDS, _QUESTIONS = 50, 32, 9, 3
# With random 16-bit weights many logits are nearly equal; a difference of this many units in the last place is a tie.
_TIE_UNITS = 8


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        model: A checkpoint's directory or hub id; without model and config, the embedded model.
        config: One of dummy.NAMES, for random weights.
        video: A file or a folder of frames (default: a drawn clip).
        questions: The first one is timed.
        frames: To sample.
        new_tokens: The longest answer.
        layout, device, dtype, attention, backend: As in `SlowFastLlava.from_pretrained`.
        rounds: Paired rounds.
    """

    model: str | None = None
    config: str | None = None
    video: Path | None = None
    questions: tuple[str, ...] = ()
    frames: int = DEFAULT_FRAMES
    new_tokens: int = DEFAULT_NEW_TOKENS
    layout: str | None = None
    rounds: int = DEFAULT_ROUNDS
    device: str | None = None
    dtype: str | None = None
    attention: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.model and self.config:
            raise InputError("a checkpoint (--model) has shapes of its own: leave --config out")
        if self.config and self.config not in NAMES:
            raise InputError(f"unknown config {self.config!r}: choose one of {', '.join(NAMES)}")
        if self.rounds < 2:
            raise InputError("rounds must be at least 2: one has no spread")

    @property
    def name(self) -> str:
        return self.config or self.model or "embedded"


def run(settings: Settings, save: Callable[[dict], None] = lambda result: None, trace: Path | None = None) -> dict:
    """Measure both pipelines.

    Args:
        settings: The options.
        save: Gets the result after the comparison of answers and at the end.
        trace: Write a profile of one answer there.

    Returns:
        The result; questions whose answers differ are in "errors".
    """
    with _video(settings) as path:
        pair = PipelinePair.set_up(settings, path)
        result = {"kind": "pipeline", "machine": machine(pair.device.type), "settings": pair.describe()}
        result |= {"unavailable": {}, "skipped": {}, "errors": {}, "works": {}}
        guarded(COMPILED, result["unavailable"], pair.compile_aggregation)
        result["answers"], result["errors"] = pair.compare_answers()
        save(result)
        result |= figures(pair.job(), pair.steps, pair.rounds(), pair.ceilings, pair.memory(), pair.bars())
        save(result)
        if trace:
            pair.trace(trace)
    return result


@contextmanager
def _video(settings: Settings) -> Iterator[Path]:
    if settings.video:
        yield settings.video
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("drawn.mp4" if util.find_spec("av") else "drawn images")
        if path.suffix:
            clip.write_clip(path)
        else:
            clip.write_images(path, settings.frames)
        yield path


def load(settings: Settings) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint, and its vision tower with all layers."""
    if settings.config:
        return dummy_checkpoint(settings.config, settings.device, settings.dtype, settings.attention)
    name = settings.model or embedded.model_dir()
    checkpoint = loading.load_checkpoint(name, settings.dtype, settings.device, settings.attention)
    path = loading.locate(name)
    raw, model = loading.read_config(path), checkpoint.model
    attention = checkpoint.attention.implementation
    whole = loading.load_model(path, raw, loading.stock_config(path, raw), model.dtype, model.device, attention)
    checkpoint = replace(checkpoint, name=settings.name)
    return checkpoint, whole.model.vision_tower


@dataclass
class PipelinePair:
    """Both pipelines on one device, with the same video."""

    settings: Settings
    path: Path
    ours: SlowFastLlava
    plain: Baseline
    decoded: clip.DecodedVideo
    questions: tuple[str, ...]
    ceilings: Ceilings
    steps: dict[str, int] = field(default_factory=dict)
    compiled: Callable[[], torch.Tensor] | None = None

    @classmethod
    def set_up(cls, settings: Settings, path: Path) -> PipelinePair:
        if settings.layout is not None and not isinstance(parse_layout(settings.layout), SlowFastLayout):
            raise InputError(f"the plain pipeline has no layout {settings.layout}: name sf_llava or a slowfast-... one")
        video = open_video(path)
        checkpoint, tower = load(settings)
        plain = Baseline(checkpoint.model, tower)
        options = ModelOptions(layout=settings.layout, backend=settings.backend)
        ours = SlowFastLlava(Pipeline.build(checkpoint, options))
        decoded = clip.DecodedVideo(video, sample_frames(video.total, settings.frames))
        questions = settings.questions or tuple(embedded.sample_questions()[:_QUESTIONS])
        ceilings = Ceilings(ours.device, ours.dtype)
        return cls(settings, path, ours, plain.use_settings_of(ours), decoded, questions, ceilings)

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @property
    def random(self) -> bool:
        return self.settings.config is not None

    @property
    def indices(self) -> list[int]:
        return sample_frames(self.decoded.total, self.settings.frames)

    def describe(self) -> dict:
        """The settings with their defaults filled in, and what follows from them."""
        ours, plan = self.ours, self.job().plan
        facts = asdict(self.settings) | {
            "model": self.settings.name,
            "config": None,
            "video": self.path.name,
            "questions": list(self.questions),
            "random_weights": self.random,
            "layout": str(ours.layout),
            "dtype": str(ours.dtype).removeprefix("torch."),
            "device": str(ours.device),
            "attention": ours.checkpoint.attention.describe(),
            "backend": ours.pipeline.encoder.backend,
        }
        size = list(self.decoded.size)
        return facts | {
            "frames": len(self.indices),
            "frame_size": size,
            "video_tokens": plan.offsets[-1],
            "prompt_tokens": self.job().prompt,
        }

    def job(self) -> costs.Job:
        ours = self.ours
        plan = ours.layout.plan(len(self.indices), ours.checkpoint.grid)
        prompt = ours.pipeline.prompts.prompt(self.questions[0])
        config, depths = ours.checkpoint.model.config, ours.checkpoint.depths
        return costs.Job(
            config, plan, self.decoded.size, depths, len(prompt), len(prompt.after), 1, ours.dtype.itemsize
        )

    # --- correctness

    def compare_answers(self) -> tuple[list[dict], dict[str, str]]:
        """Both pipelines' tokens for every question, and the differences by question."""
        answers, errors = [], {}
        turns = self._ask_in_turn(self.questions)
        for number, question in enumerate(self.questions):
            plain = self.ask_plain(question)
            ours = {"a call of its own": self.ask_ours(question), "the video kept": turns[number]}
            ties = 0
            for how, answer in ours.items():
                wrong, tied = self.difference(plain, answer.token_ids)
                ties += tied
                if wrong:
                    errors[f"{question} ({how})"] = wrong
            self.steps.setdefault(OURS, max(len(answer.token_ids) - 1, 0))
            self.steps.setdefault(PLAIN, max(len(plain.token_ids) - 1, 0))
            answers.append({"question": question, "token_ids": plain.token_ids, "near_ties": ties})
        return answers, errors

    def difference(self, plain: PlainAnswer, ids: list[int]) -> tuple[str | None, int]:
        """The difference, None if there is none that counts; and the number of near ties of random weights."""
        if ids == plain.token_ids:
            return None, 0
        if not ids:
            return "ours is empty", 0
        logits = self.plain.logits(plain, ids)
        best, chosen = logits.max(dim=1).values, logits[range(len(ids)), ids]
        short = (best - chosen) / (torch.finfo(self.ours.dtype).eps * best.abs())
        whole = self.plain.ends(ids, self.settings.new_tokens)
        if self.random and self.ours.dtype.itemsize == 2 and whole and bool((short <= _TIE_UNITS).all()):
            return None, int((short > 0).sum())
        pairs = enumerate(zip([*ids, None], [*plain.token_ids, None]))
        place, (our, their) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        gap = f", {short[place]:.1f} units of the last place below" if place < len(ids) else ""
        return f"token {place} is {our}{gap}; the plain pipeline has {their}", 0

    # --- times

    def rounds(self) -> Times:
        """Times of all rounds, after one of warm-up; the order alternates."""
        times, turns = Times(), [self._time_ours, self._time_plain]
        if self.compiled:
            turns.append(self._time_compiled)
        for round_ in progress(range(-1, self.settings.rounds)):
            kept = times if round_ >= 0 else Times()
            for turn in turns if round_ % 2 else turns[::-1]:
                turn(kept)
            if round_ >= 0:
                self.ceilings.measure()
        return times

    def _time_ours(self, times: Times) -> None:
        answer = self.ask_ours(self.questions[0])
        times.add_stages(OURS, {stage: answer.seconds[stage] for stage in STAGES if stage in answer.seconds})
        times.add_first(OURS, FROM_FRAMES, answer.ttft)
        answer = self.ask_ours(self.questions[0], self.path)
        times.add_stages(OURS, {"decode": answer.seconds["decode"], "wait": answer.seconds["wait"]})
        times.add_first(OURS, WITH_DECODING, answer.ttft)
        times.add_first(OURS, SECOND, self._ask_in_turn((self.questions[0], self.questions[-1]))[1].ttft)

    def _time_plain(self, times: Times) -> None:
        answer = self.ask_plain(self.questions[0], self.path)
        times.add_stages(PLAIN, answer.seconds)
        times.add_first(PLAIN, WITH_DECODING, answer.ttft)
        times.add_first(PLAIN, FROM_FRAMES, answer.ttft - answer.seconds["decode"])

    @torch.inference_mode()
    def compile_aggregation(self) -> None:
        """Compiles the plain aggregation for features of the run's shape. AssertionError if its tokens differ."""
        grid, config = self.ours.checkpoint.grid, self.ours.checkpoint.model.config.text_config
        shape = len(self.indices), grid[0] * grid[1], config.hidden_size
        features = torch.randn(shape, device=self.device).to(self.ours.dtype)
        compiled = torch.compile(self.plain.aggregate, dynamic=False)
        near = 4 * torch.finfo(self.ours.dtype).eps
        torch.testing.assert_close(compiled(features), self.plain.aggregate(features), rtol=near, atol=near)
        self.compiled = lambda: compiled(features)

    @torch.inference_mode()
    def _time_compiled(self, times: Times) -> None:
        seconds: dict[str, float] = {}
        with self.plain.timed("aggregate", seconds):
            self.compiled()
        times.add_stages(COMPILED, seconds)

    def ask_ours(self, question: str, video: Video | Path | None = None) -> Answer:
        settings = self.settings
        return self.ours.answer(
            video or self.decoded, question, frames=settings.frames, max_new_tokens=settings.new_tokens
        )

    def ask_plain(self, question: str, video: Video | Path | None = None) -> PlainAnswer:
        return self.plain.answer(video or self.decoded, question, self.settings.frames, self.settings.new_tokens)

    def _ask_in_turn(self, questions: Sequence[str]) -> list[Answer]:
        """Answers to questions in one session."""
        session = self.ours.open(self.decoded, frames=self.settings.frames)
        try:
            return [session.ask(question, max_new_tokens=self.settings.new_tokens) for question in questions]
        finally:
            session.close(spare=True)

    def bars(self) -> Bars:
        settings = self.settings
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        usual = settings.video is None and settings.layout is None and settings.frames == DEFAULT_FRAMES
        return BARS.get((folder_name(name), settings.name), Bars()) if usual else Bars()

    # --- memory, trace

    def memory(self) -> dict[str, dict[str, int | None]]:
        """By pipeline, bytes of its weights, growth during a call, and on a GPU the peak of both."""
        self.compiled = None  # its features would count as caches of ours
        question = self.questions[0]
        models = {OURS: self.ours.checkpoint.model, PLAIN: self.plain.model}
        weights = {who: memory.size(model.parameters()) for who, model in models.items()}
        grown = {
            OURS: memory.growth(self.device, lambda: self.ask_ours(question)),
            PLAIN: memory.growth(self.device, lambda: self.ask_plain(question)),
        }
        peaks = dict.fromkeys(models)
        if self.device.type == "cuda":
            both = memory.size([*models[OURS].parameters(), *models[PLAIN].parameters()])
            others = torch.cuda.memory_allocated(self.device) - both  # caches of our pipeline
            peaks = {who: weights[who] + grown[who] + (others if who == OURS else 0) for who in models}
        return {
            who: {"weights_bytes": weights[who], "growth_bytes": grown[who], "peak_bytes": peaks[who]} for who in models
        }

    def trace(self, path: Path) -> None:
        """Write a profile of one answer with named stages, for Perfetto or chrome://tracing."""
        from torch.profiler import ProfilerActivity, profile, record_function

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as profiler, record_function("sfllava_fast.answer"):
            self.ask_ours(self.questions[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
