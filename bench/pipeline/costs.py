"""FLOP and bytes of every stage, counted from shapes.

FLOP are those of matrix products, two per multiply-add; of causal attention only the lower triangle. Bytes are those
that must move if each stage were one kernel: its weights, inputs and outputs, each once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sfllava_fast.layouts.plan import Plan

from ..op.works import patches_of


@dataclass(frozen=True)
class Cost:
    flop: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Job:
    """One answer.

    Attributes:
        config: A LlavaConfig.
        plan: The layout's.
        frame_size: Height and width of a frame.
        depths: Encoder layers to run for each feature that is read.
        prompt: Tokens besides the video's, `after` of them after it.
        new_tokens: Of the answer.
        itemsize: Bytes of a weight.
    """

    config: Any
    plan: Plan
    frame_size: tuple[int, int]
    depths: tuple[int, ...]
    prompt: int
    after: int
    new_tokens: int
    itemsize: int

    @property
    def frames(self) -> int:
        return sum(self.plan.lengths)

    @property
    def tokens(self) -> int:
        return self.prompt + self.plan.offsets[-1]


def ours(job: Job) -> dict[str, Cost]:
    """The stages of our pipeline, which computes only what is used.

    That is: the tower's first layers, one row of logits, and of the video's tokens in the last layer only keys and
    values.
    """
    stages = _stages(job, max(job.depths), len(job.depths), logits=1)
    prefill = stages["prefill"]
    stages["prefill"] = Cost(prefill.flop - unread(job.config.text_config, job.tokens - job.after), prefill.bytes)
    return stages


def plain(job: Job) -> dict[str, Cost]:
    """The stages of the plain pipeline: the whole tower, all its hidden states, all logits."""
    layers = job.config.vision_config.num_hidden_layers
    return _stages(job, layers, layers + 1, logits=job.tokens)


def _stages(job: Job, depth: int, states: int, logits: int) -> dict[str, Cost]:
    vision, text = job.config.vision_config, job.config.text_config
    contexts = range(job.tokens + 1, job.tokens + job.new_tokens)
    return {
        "preprocess": preprocess(job.frames, job.frame_size, vision.image_size, job.itemsize),
        "vision": tower(vision, job.frames, depth, states, job.itemsize),
        "projector": projector(job.config, len(job.depths), job.plan, job.itemsize),
        "aggregate": aggregate(job.plan, text.hidden_size, job.itemsize),
        "prefill": prefill(text, job.tokens, logits, job.itemsize),
        "generate": sum((step(text, context, job.itemsize) for context in contexts), Cost(0, 0)),
    }


def preprocess(frames: int, size: tuple[int, int], side: int, itemsize: int) -> Cost:
    return Cost(0, 3 * frames * (size[0] * size[1] + side * side * itemsize))


def tower(vision: Any, frames: int, depth: int, states: int, itemsize: int) -> Cost:
    """CLIP up to `depth` layers, of which `states` hidden states are kept."""
    width, inner = vision.hidden_size, vision.intermediate_size
    patches, patch = _patches(vision), _patch_values(vision)
    rows = patches + 1
    layer = 2 * rows * (4 * width**2 + 2 * width * inner) + 4 * rows**2 * width
    flop = frames * (2 * patches * patch * width + depth * layer)
    moved = frames * (3 * vision.image_size**2 + states * rows * width)
    return Cost(flop, itemsize * (tower_weights(vision, depth) + moved))


def tower_weights(vision: Any, depth: int) -> int:
    """Number of CLIP's weights up to `depth` layers, without the final norm."""
    width, inner = vision.hidden_size, vision.intermediate_size
    embeddings = width * (_patch_values(vision) + 1 + _patches(vision) + 1) + 2 * width
    return embeddings + depth * (4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width)


def projector(config: Any, reads: int, plan: Plan, itemsize: int) -> Cost:
    """Linear, GELU, linear over every patch of every frame."""
    wide, width = reads * config.vision_config.hidden_size, config.text_config.hidden_size
    rows = sum(plan.lengths) * plan.grid[0] * plan.grid[1]
    products = wide * width + width * width
    return Cost(2 * rows * products, itemsize * (products + 2 * width + rows * (wide + width)))


def aggregate(plan: Plan, width: int, itemsize: int) -> Cost:
    return Cost(0, (patches_of(plan, plan.pathways) + plan.offsets[-1]) * width * itemsize)


def prefill(text: Any, tokens: int, logits: int, itemsize: int) -> Cost:
    """The language model over a whole prompt, with `logits` rows of logits."""
    layers = mixture_of_depths(text, tokens, tokens, 0)
    flop = sum(layers.values()) + 2 * logits * text.vocab_size * text.hidden_size
    moved = tokens * (text.hidden_size + _cached(text)) + logits * text.vocab_size
    return Cost(flop, itemsize * (language_weights(text) + moved))


def mixture_of_depths(text: Any, tokens: int, kept: int, mixed: int, scores: int = 0) -> dict[str, int]:
    """FLOP of a prompt's hidden states if `mixed` of the layers run on `kept` tokens.

    Args:
        text: The language model's config.
        tokens: Of the prompt.
        kept: Tokens in a mixed layer.
        mixed: Number of mixed layers.
        scores: FLOP of a mixed layer's scores.

    Returns:
        FLOP of matrix products and of causal attention.
    """
    layers = text.num_hidden_layers
    whole = layers - mixed
    rows = whole * tokens + mixed * kept
    seen = whole * sum(range(1, tokens + 1)) + mixed * sum(range(1, kept + 1))
    products = 2 * rows * _linear(text) // layers + mixed * scores
    return {"products": products, "attention": _attention(text, [seen]) // layers}


def score(text: Any, scorer: str, tokens: int, vision: int) -> int:
    """FLOP of a layer's scores of `vision` tokens; "attention" is that of the last token over all keys."""
    heads = text.num_attention_heads * _head_dim(text)
    keys = text.num_key_value_heads * _head_dim(text)
    attention = 2 * text.hidden_size * (tokens * keys + heads) + 2 * tokens * heads
    return {"learned": 2 * vision * text.hidden_size, "norm": 0, "text": 0, "attention": attention}[scorer]


def unread(text: Any, tokens: int) -> int:
    """FLOP of the last layer for a prompt's first tokens, without their keys and values: attention and after."""
    heads = text.num_attention_heads * _head_dim(text)
    products = text.hidden_size * (heads + 3 * text.intermediate_size)
    return 2 * tokens * products + _attention(text, range(1, tokens + 1)) // text.num_hidden_layers


def step(text: Any, context: int, itemsize: int) -> Cost:
    """A decode step with a context of `context` tokens: all weights, and the cache."""
    flop = 2 * (_linear(text) + text.vocab_size * text.hidden_size) + _attention(text, [context])
    return Cost(flop, itemsize * (language_weights(text) + context * _cached(text)))


def language_weights(text: Any) -> int:
    """Number of weights that a Llama reads for a token: all but the unused rows of its embeddings."""
    norms = (2 * text.num_hidden_layers + 1) * text.hidden_size
    return _linear(text) + norms + text.vocab_size * text.hidden_size


def _linear(text: Any) -> int:
    heads = text.num_attention_heads * _head_dim(text)
    products = 2 * heads + 2 * text.num_key_value_heads * _head_dim(text) + 3 * text.intermediate_size
    return text.num_hidden_layers * text.hidden_size * products


def _attention(text: Any, contexts: Iterable[int]) -> int:
    return 4 * text.num_hidden_layers * text.num_attention_heads * _head_dim(text) * sum(contexts)


def _cached(text: Any) -> int:
    """Number of values of a token in the KV cache."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * _head_dim(text)


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _patches(vision: Any) -> int:
    return (vision.image_size // vision.patch_size) ** 2


def _patch_values(vision: Any) -> int:
    return 3 * vision.patch_size**2
