"""The plain pipeline: the published order and operators on the stock transformers model.

- Pillow resizes frame by frame.
- The whole vision tower runs on all frames at once and keeps every hidden state.
- Every patch is projected before pooling.
- Embeddings are joined by torch.cat; the prefill computes every token's logits.
- Tokens are generated one by one with a cache that grows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.model.checkpoint import rope_type
from sfllava_fast.model.prompts import Prompt
from sfllava_fast.model.transformers_release import cache_argument, cache_in
from sfllava_fast.video import Video, open_video

from ..op.peers import plain_tokens
from .dummy import on_the_same_weights


@dataclass
class PlainAnswer:
    """Token ids, seconds by stage, and the prompt's embeddings, from which `Baseline.logits` computes logits."""

    token_ids: list[int]
    seconds: dict[str, float]
    embeds: Tensor = field(repr=False)

    @property
    def ttft(self) -> float:
        """Seconds to the first token: the sum of the stages up to it."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != "generate")


class Baseline:
    """The plain pipeline with the weights, prompt, layout, attention and stops of ours; nothing else is shared.

    It is made before ours, which may change its model.

    Args:
        model: The checkpoint's model.
        tower: The vision tower with all layers.
    """

    def __init__(self, model: nn.Module, tower: nn.Module) -> None:
        self.model = on_the_same_weights(model)
        self.model.model.vision_tower = tower

    def use_settings_of(self, ours: SlowFastLlava) -> Baseline:
        """Take settings, prompts and stop rules from our pipeline."""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.ours = ours
        self.device, self.dtype = self.model.device, self.model.dtype
        self.processor = CLIPImageProcessorPil.from_dict(dict(ours.checkpoint.preprocessor))
        return self

    @torch.inference_mode()
    def answer(self, video: Path | Video, question: str, frames: int, max_new_tokens: int) -> PlainAnswer:
        prompt = self.ours.pipeline.prompts.prompt(question)
        seconds: dict[str, float] = {}
        with self.timed("decode", seconds):
            clip = open_video(video) if isinstance(video, Path) else video
            pictures = clip.frames(sample_frames(clip.total, frames))
        with self.timed("preprocess", seconds):
            pixels = self.preprocess(pictures)
        with self.timed("vision", seconds):
            patches = self.encode(pixels)
        with self.timed("projector", seconds):
            features = self.model.model.multi_modal_projector(patches)
        with self.timed("aggregate", seconds):
            tokens = self.aggregate(features)
        self._forget_length()
        with self.timed("prefill", seconds):
            embeds = self.embed(prompt, tokens)
            output = self.model(inputs_embeds=embeds, use_cache=True)
            ids = [int(output.logits[0, -1].argmax())]
        with self.timed("generate", seconds):
            cache = cache_argument(self.model, cache_in(output))
            while not self.ends(ids, max_new_tokens):
                step = torch.tensor([ids[-1:]], device=self.device)
                logits = self.model(input_ids=step, use_cache=True, **cache).logits
                ids.append(int(logits[0, -1].argmax()))
        return PlainAnswer(ids, seconds, embeds)

    def preprocess(self, pictures: Tensor) -> Tensor:
        """Stretched to the square by Pillow, then CLIP's image processor, a frame at a time."""
        from PIL import Image

        spec = self.ours.pipeline.encoder.preprocess_spec
        height, width = spec.resized(*pictures.shape[1:3])
        resample = Image.Resampling[spec.resample.upper()]
        images = (Image.fromarray(picture).resize((width, height), resample) for picture in np.asarray(pictures))
        pixels = [self.processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
        return torch.cat(pixels).to(self.device, self.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        layers = self.model.config.vision_feature_layer
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        read = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        first = int(self.ours.checkpoint.drops_first)
        return torch.cat([state[:, first:] for state in read], dim=-1) if len(read) > 1 else read[0][:, first:]

    def aggregate(self, features: Tensor) -> Tensor:
        layout = self.ours.layout
        slow = torch.linspace(0, len(features), layout.slow_frames + 1)[:-1].long().to(self.device)
        return plain_tokens(layout, slow, self.ours.checkpoint.grid)(features)

    def embed(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        embed = self.model.get_input_embeddings()
        before, after = (embed(torch.tensor(ids, device=self.device)) for ids in (prompt.before, prompt.after))
        return torch.cat([before, tokens, after])[None]

    @torch.inference_mode()
    def logits(self, answer: PlainAnswer, token_ids: list[int]) -> Tensor:
        """The plain pipeline's logits [n, V] for each of these tokens, after the prompt of its own answer."""
        generated = self.model.get_input_embeddings()(torch.tensor([token_ids[:-1]], dtype=int, device=self.device))
        embeds = torch.cat([answer.embeds, generated], dim=1)
        self._forget_length()
        return self.model(inputs_embeds=embeds, logits_to_keep=len(token_ids)).logits[0].float()

    def ends(self, ids: list[int], max_new_tokens: int) -> bool:
        """Whether nothing follows these tokens."""
        prompts = self.ours.pipeline.prompts
        stop = prompts.stop_text
        ended = bool(stop) and stop in prompts.tokenizer.decode(ids[-16:], skip_special_tokens=True)
        return ended or ids[-1] in prompts.stop_ids or len(ids) == max_new_tokens

    def _forget_length(self) -> None:
        """Reset a dynamic rotary embedding, which keeps the scale of its longest input until it gets a short one."""
        language_model = self.model.model.language_model
        if rope_type(language_model.config) == "dynamic":
            first = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            language_model.rotary_emb(torch.empty(1, dtype=self.dtype, device=self.device), first)

    @contextmanager
    def timed(self, stage: str, seconds: dict[str, float]) -> Iterator[None]:
        start = self._now()
        yield
        seconds[stage] = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
