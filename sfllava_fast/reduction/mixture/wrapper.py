"""Mixture of depths for vision tokens (VideoLLM-MoD, arXiv 2408.16730).

Mixed layers compute only on the vision tokens of each frame with the highest scores. Other vision tokens are unchanged,
and those layers store no keys and values of them.

How it works: `forward` of the model, its decoder and the mixed layers is replaced. The decoder's creates a `Pass`, with
the offsets of the vision tokens and the current selection. Layers read it from the wrapper. A checkpointed layer, which
runs again in backward, reads it from an attribute of its rotary embeddings. The tokens that each layer stores are an
attribute of the cache (cache_spans.py), so that copies of the cache have it too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn

from ...errors import InputError, PatchError, first_line
from ...model.transformers_release import cache_in, release
from ...ops.token_offsets import check_frames, check_ratio, clip_frames, kept_of, placeholder_frames
from ...patching import Patch, undo
from ...tensor_file import load_tensors, save_tensors
from ..scorers import AttentionReceived, LayerInput, Scorer, make_scorers
from ..weights import weight_replacements
from .cache_spans import recall
from .decoder_checks import check_layers, check_pass, find_decoder
from .mixed_layer import Pass, run_on_all, run_on_selection, select

_FORMAT = "sfllava_fast.mixture_of_depths"


class MixtureOfDepths(nn.Module):
    """Wraps a transformers model with a Llama-like decoder, in place.

    `undo`, or the end of a `with` block, restores the model exactly. The module's parameters are the scorers'; the
    model's parameters and state_dict are unchanged.

    `on_frames` sets where the vision tokens are. Without it they are the run of the config's image or video
    placeholders in `input_ids`, as one frame. All rows of a batch must have them at the same offsets: pad on the left
    if prompts differ before the video, or on the right (with an `attention_mask`) if they differ after it.

    Args:
        model: For causal language modelling, LLaVA-style, or a bare decoder. Wrap it after `patch_transformers`.
        ratio: A mixed layer computes on the ceil(ratio * n) of a frame's n vision tokens with the highest scores. May
            be a mapping of layers to ratios. With 1 the layer's bits are unchanged.
        scorer: "norm", "learned" (LayerExpert), "text" or "attention"; an nn.Module or function of a LayerInput that
            returns scores [B, V], of which the highest are kept; or a mapping of layers to these.
        layers: Numbers of the mixed layers, from 0. None stands for every other one, from the second, as published. The
            first layer of each attention type cannot be mixed, since transformers takes the cache's length from it.
        weighted: If False, a kept token becomes block(token); the score gets a straight-through gradient, as if its
            sigmoid scaled the block. Models need no training. If True, as published, it becomes
            token + score * (block(token) - token) with the raw score; scorer and model must be trained with it.
        per_frame: Whether tokens compete within their frame. If False, all vision tokens compete.
        select_at: The number of the layer whose scorer selects the tokens of all mixed layers, from the layer's input;
            it must not follow the first mixed layer. None if every mixed layer selects.
        weights: Weights of the decoder, by name as in its `named_parameters`, that were trained with learned scorers.
            They replace the model's until `undo`.

    Attributes:
        ratios: The ratio of each mixed layer.
        layers: The mixed layers, ascending.
        scorers: The scorer of each selecting layer.

    Raises:
        PatchError: If the model's layers are not supported. The model is unchanged.
        InputError: For other wrong arguments. The model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float | Mapping[int, float] = 0.2,
        scorer: Scorer = "norm",
        layers: Sequence[int] | None = None,
        *,
        weighted: bool = False,
        per_frame: bool = True,
        select_at: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        decoder = find_decoder(model)
        if isinstance(ratio, Mapping):
            if layers is not None and set(layers) != set(ratio):
                raise InputError(f"ratio has layers {sorted(ratio)}, and layers are {sorted(layers)}: give one of them")
            layers = list(ratio)
        self.ratio, self.layers = ratio, check_layers(decoder, layers)
        self.ratios = {at: check_ratio(ratio[at] if isinstance(ratio, Mapping) else ratio) for at in self.layers}
        self.weighted, self.per_frame, self.select_at = weighted, per_frame, select_at
        if select_at is not None and (select_at not in range(self.layers[0] + 1) or len({*self.ratios.values()}) > 1):
            raise InputError(f"select_at={select_at!r} must be a layer up to {self.layers[0]}, with one ratio for all")
        selecting = self.layers if select_at is None else (select_at,)
        self.scorers = make_scorers(scorer, selecting, decoder.config.hidden_size)
        for at in selecting:
            self.scorers[str(at)].to(next(decoder.layers[at].parameters()).device)
        self._token_offsets: tuple[int, ...] | None = None
        self._pass: Pass | None = None
        self._depth = len(decoder.layers)
        undo(decoder)  # so that stock attributes are replaced, and called
        replaced = [_Forward(decoder.layers[at], self._run_layer, at) for at in {*self.layers, *selecting}]
        replaced.append(_Forward(decoder, self._run_decoder))
        if decoder is not model:
            replaced.append(_Forward(model, self._run_model))
        self.weights = dict(weights or {})
        swaps = weight_replacements(model, decoder, self.weights)
        self._patch = Patch(decoder, [*((forward.owner, "forward", forward) for forward in replaced), *swaps])

    @classmethod
    def fastv(cls, model: nn.Module, ratio: float = 0.5, layer: int = 2) -> MixtureOfDepths:
        """FastV (arXiv 2403.06764), with any attention.

        Layers before `layer` compute on all tokens. Later layers compute on the vision tokens that receive the most
        attention from the prompt's last token in the layer before `layer`.

        Args:
            model: As in the class.
            ratio: Share of the vision tokens that is kept, the paper's 1 - R.
            layer: The paper's K.
        """
        layers = range(layer, len(find_decoder(model).layers))
        return cls(model, ratio, AttentionReceived(), layers, per_frame=False, select_at=layer - 1)

    @contextmanager
    def on_frames(self, token_offsets: Sequence[int]) -> Iterator[None]:
        """Context in which the model's sequences have vision tokens at these offsets.

        Tokens that are in a cache already need no offsets.

        Args:
            token_offsets: [F + 1], the first token of each frame and the end of the last, counted from the sequence's
                first token, padding included. All other tokens are text.

        Raises:
            InputError: If the offsets do not ascend.
        """
        before, self._token_offsets = self._token_offsets, check_frames(token_offsets)
        try:
            yield
        finally:
            self._token_offsets = before

    def skipped(self, token_offsets: Sequence[int]) -> tuple[int, ...]:
        """Number of tokens that each layer leaves out of a sequence with vision tokens at these offsets."""
        offsets = self._competing(check_frames(token_offsets))
        sizes = [stop - start for start, stop in zip(offsets, offsets[1:])]
        ratios = [self.ratios.get(number, 1.0) for number in range(self._depth)]
        return tuple(sum(size - kept_of(ratio, size) for size in sizes) for ratio in ratios)

    def save(self, path: str | Path) -> Path:
        """Write the scorers, `weights` and settings as a safetensors file for `load`, atomically.

        Raises:
            InputError: If the file cannot be written.
        """
        settings = {name: getattr(self, name) for name in ("ratios", "weighted", "per_frame", "select_at")}
        return save_tensors("the scorers", path, self.state_dict() | self.weights, {_FORMAT: json.dumps(settings)})

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, ratio: float | None = None) -> MixtureOfDepths:
        """Wrap a model with the learned scorers and weights in a file.

        Args:
            model: As in the class.
            path: A file that `save` wrote.
            ratio: Replaces the ratios in the file.

        Raises:
            InputError: If the file has no scorers, or scorers for another model. The model is unchanged.
        """
        try:
            tensors, metadata = load_tensors(path)
            settings = _parse_settings(metadata[_FORMAT])
        except (KeyError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path} has no scorers of a mixture of depths ({first_line(error)}): give a file that `save` wrote"
            ) from error
        ratios = {at: saved if ratio is None else ratio for at, saved in settings.pop("ratios").items()}
        selecting = ratios if settings["select_at"] is None else [settings["select_at"]]
        width = find_decoder(model).config.hidden_size
        of_layer = {"weight": [1, width], "bias": [1]}
        weights = {name: tensors.pop(name) for name in [*tensors] if not name.startswith("scorers.")}
        shapes = {f"scorers.{at}.linear.{name}": of_layer[name] for at in selecting for name in of_layer}
        if {name: list(value.shape) for name, value in tensors.items()} != shapes:
            raise InputError(f"the scorers in {path} are not LayerExperts of this model's width, {width}")
        if not all(value.is_floating_point() and value.isfinite().all() for value in tensors.values()):
            raise InputError(f"the scorers in {path} are not finite numbers: give a file that `save` wrote")
        mixture = cls(model, ratios, "learned", **settings, weights=weights)
        mixture.load_state_dict(tensors)
        return mixture

    def undo(self) -> None:
        """Restore the model's attributes. Raises PatchError if one of them was replaced again since."""
        self._patch.undo()

    def __enter__(self) -> MixtureOfDepths:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _competing(self, offsets: tuple[int, ...]) -> tuple[int, ...]:
        return offsets if self.per_frame or not offsets else (offsets[0], offsets[-1])

    def _run_model(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The whole model, on the placeholders in its input_ids unless `on_frames` gives the offsets."""
        named = forward.named(args, kwargs)
        ids, found = named.get("input_ids"), None
        if self._token_offsets is None and ids is not None and ids.shape[1] > 1:  # a single token is a decoding step
            names = [getattr(forward.owner.config, name, None) for name in ("image_token_id", "video_token_id")]
            found = placeholder_frames(ids, [token for token in names if token is not None])
        with self.on_frames([_past(named) + at for at in found]) if found else nullcontext():
            return forward.plain(*args, **kwargs)

    def _run_decoder(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = forward.named(args, kwargs)
        cache, past = cache_in(named), _past(named)
        tokens = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        end = past + tokens.shape[1]
        offsets = clip_frames(self._token_offsets, past, end) if self._token_offsets else ()
        if (cache is not None and recall(cache, past)) or offsets:
            check_pass(forward.owner, self.layers, named, end)
        self._pass = now = Pass(past, self._competing(offsets))
        try:
            return forward.plain(*args, **kwargs)
        finally:
            now.forget_graph()
            self._pass = None

    def _run_layer(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A layer that selects, that is mixed, or both.

        ========  =====  ====================================================
        selects   mixed
        ========  =====  ====================================================
        yes       yes    selects, then runs on the selection
        yes       no     selects, then runs on all tokens
        no        yes    runs on the selection of an earlier layer
        ========  =====  ====================================================

        Without vision tokens, or with ratio 1 and no weights, it runs on all tokens.
        """
        arguments = forward.named(args, kwargs)
        hidden, number, now = arguments.pop("hidden_states"), cast(int, forward.number), self._current(arguments)
        if now is None:
            return forward.plain(hidden, **arguments)
        ratio = self.ratios.get(number, self.ratios[self.layers[0]])  # all ratios are equal if another layer selects
        if now.token_offsets and (ratio < 1 or self.weighted):
            if str(number) in self.scorers:
                at = LayerInput(hidden, now.token_offsets[0], now.token_offsets[-1], forward.owner, arguments)
                now.selection = select(self.scorers[str(number)], at, now.token_offsets, ratio)
            if number in self.ratios:
                return run_on_selection(forward.plain, hidden, arguments, number, now, self.weighted)
        return run_on_all(forward.plain, hidden, arguments, number, now)

    def _current(self, arguments: dict[str, Any]) -> Pass | None:
        """The forward pass of a call of a layer; None if the layer is called outside of one."""
        rotary = arguments.get("position_embeddings")
        if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
            found = f"{type(rotary).__name__}, not cosines and sines ({release()})"
            raise PatchError(f"the model's rotary embeddings are a {found}: the model is not supported")
        if self._pass is not None:
            rotary[0].sfllava_fast_pass = self._pass  # for a checkpointed layer, which runs again in backward
        return getattr(rotary[0], "sfllava_fast_pass", None)


class _Forward:
    """The replacement of a module's `forward`. An object, so that a copy of the model calls the copy's module."""

    def __init__(self, owner: nn.Module, run: Callable[..., Any], number: int | None = None) -> None:
        self.owner, self.run, self.number = owner, run, number
        self.own = vars(owner).get("forward")  # set by other libraries
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, args, kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        return self.own or MethodType(type(self.owner).forward, self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)  # `generate` reads it

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args)) | kwargs


def _parse_settings(text: str) -> dict[str, Any]:
    """The settings that `save` wrote, with integer layers. Raises ValueError for any other text."""
    settings = json.loads(text)
    if not isinstance(settings, dict) or set(settings) != {"ratios", "weighted", "per_frame", "select_at"}:
        raise ValueError("its settings are not a mixture's")
    ratios, at = settings["ratios"], settings["select_at"]
    flags = isinstance(settings["weighted"], bool) and isinstance(settings["per_frame"], bool)
    if not flags or not isinstance(ratios, dict) or not (at is None or type(at) is int):
        raise ValueError("its settings are not a mixture's")
    return settings | {"ratios": {int(layer): ratio for layer, ratio in ratios.items()}}


def _past(named: dict[str, Any]) -> int:
    cache = cache_in(named)
    return 0 if cache is None else int(cache.get_seq_length())
