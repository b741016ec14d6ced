"""Mixture of depths for vision tokens (VideoLLM-MoD, arXiv 2408.16730): in some layers only the vision tokens of each
frame that score highest are computed on; the others pass unchanged, and leave no keys and values there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

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
    """Wraps a transformers model with a Llama-like decoder, in place; `undo`, or leaving it as a context, restores it
    exactly. Its parameters are the scorers' alone; the model's own, and its state_dict, stay as they are.

    model: for causal language modelling, LLaVA-style, or a bare decoder; wrap it after `patch_transformers`.
    ratio: of each frame's n vision tokens, a mixed layer computes on the ceil(ratio * n) that score highest; or a
        mapping of layers to ratios. With 1 a layer is the plain one, bit for bit.
    scorer: "norm", "learned" (LayerExpert), "text", "attention"; an nn.Module or function of LayerInput to scores
        [B, V], higher is kept; or a mapping of layers to these.
    layers: which layers are mixed, counted from 0; None: every other one, from the second on, as published. The first
        of each kind of attention never is: transformers measures the cache by it.
    weighted: False: a kept token becomes block(token), and the score gets a gradient straight through, as if its
        sigmoid weighed the block; trained weights serve as they are. True, as published: it becomes
        token + score * (block(token) - token), with the raw score; scorer and model must have been trained so.
    per_frame: False: all vision tokens compete, as if they were one frame's.
    select_at: None: every mixed layer selects for itself. A layer's number: what that one's scorer selects, of what
        enters it, all mixed layers keep; it comes before them or is their first.
    weights: of the decoder, by name as in its `named_parameters`, that were trained with learned scorers: they take the
        place of the model's own until `undo`.

    `on_frames` sets where the vision tokens are. Without it they are the run of the config's image or video
    placeholders in `input_ids`, as one frame. All rows of a batch have theirs at the same offsets: pad on the left,
    where prompts differ before the video, or on the right (`attention_mask` tells), where they differ behind it.

    Raises PatchError for a model whose layers it does not know, InputError for the rest; either leaves it as it was.
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
                raise InputError(f"ratio is for layers {sorted(ratio)}, and layers are {sorted(layers)}: give one")
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
        undo(decoder)  # what is replaced now, and what it calls, are the stock attributes
        replaced = [_Forward(decoder.layers[at], self._run_layer, at) for at in {*self.layers, *selecting}]
        replaced.append(_Forward(decoder, self._run_decoder))
        if decoder is not model:
            replaced.append(_Forward(model, self._run_model))
        self.weights = dict(weights or {})
        swaps = weight_replacements(model, decoder, self.weights)
        self._patch = Patch(decoder, [*((forward.owner, "forward", forward) for forward in replaced), *swaps])

    @classmethod
    def fastv(cls, model: nn.Module, ratio: float = 0.5, layer: int = 2) -> MixtureOfDepths:
        """FastV (arXiv 2403.06764) inside the language model, under any attention: layers before `layer` see every
        token; of all vision tokens the later ones compute on those that get the most attention from the last token of
        the prompt, in the layer before. ratio: of the tokens that are kept, 1 - R in the paper's terms."""
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
        """Write the scorers' weights and `weights` as safetensors, layers and ratios in the metadata, for `load`: whole
        or not at all. Raises InputError where they cannot be written."""
        settings = {name: getattr(self, name) for name in ("ratios", "weighted", "per_frame", "select_at")}
        return save_tensors("the scorers", path, self.state_dict() | self.weights, {_FORMAT: json.dumps(settings)})

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, ratio: float | None = None) -> MixtureOfDepths:
        """A model wrapped with the learned scorers and the weights that were saved; ratio: instead of theirs.

        Raises InputError where the file holds none, or they are not for this model; it is left as it was.
        """
        try:
            tensors, metadata = load_tensors(path)
            settings = _parse_settings(metadata[_FORMAT])
        except (KeyError, ValueError, RecursionError) as error:
            said = f"{path} holds no scorers of a mixture of depths ({first_line(error)}): give what `save` wrote"
            raise InputError(said) from error
        ratios = {at: saved if ratio is None else ratio for at, saved in settings.pop("ratios").items()}
        selecting = ratios if settings["select_at"] is None else [settings["select_at"]]
        width = find_decoder(model).config.hidden_size
        of_layer = {"weight": [1, width], "bias": [1]}
        weights = {name: tensors.pop(name) for name in [*tensors] if not name.startswith("scorers.")}
        shapes = {f"scorers.{at}.linear.{name}": of_layer[name] for at in selecting for name in of_layer}
        if {name: list(value.shape) for name, value in tensors.items()} != shapes:
            raise InputError(f"the scorers in {path} are not LayerExperts of this model's width, {width}")
        if not all(value.is_floating_point() and value.isfinite().all() for value in tensors.values()):
            raise InputError(f"the scorers in {path} are not finite numbers: give what `save` wrote")
        mixture = cls(model, ratios, "learned", **settings, weights=weights)
        mixture.load_state_dict(tensors)
        return mixture

    def undo(self) -> None:
        """Put back the model's original attributes; PatchError where something else replaced one since."""
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
        if self._token_offsets is None and ids is not None and ids.shape[1] > 1:  # a single token is a step's
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
        self._pass = Pass(past, self._competing(offsets))
        try:
            return forward.plain(*args, **kwargs)
        finally:
            self._pass.forget_graph()
            self._pass = None

    def _run_layer(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        arguments = forward.named(args, kwargs)
        hidden, number, now = arguments.pop("hidden_states"), forward.number, self._current(arguments)
        if now is None:
            return forward.plain(hidden, **arguments)
        assert number is not None  # of a layer's forward
        ratio = self.ratios.get(number, self.ratios[self.layers[0]])  # one for all where another layer selects
        if now.token_offsets and (ratio < 1 or self.weighted):
            if str(number) in self.scorers:
                at = LayerInput(hidden, now.token_offsets[0], now.token_offsets[-1], forward.owner, arguments)
                now.selection = select(self.scorers[str(number)], at, now.token_offsets, ratio)
            if number in self.ratios:
                return run_on_selection(forward.plain, hidden, arguments, number, now, self.weighted)
        return run_on_all(forward.plain, hidden, arguments, number, now)

    def _current(self, arguments: dict[str, Any]) -> Pass | None:
        """The forward pass that a layer is called in; None where it is called by itself."""
        rotary = arguments.get("position_embeddings")
        if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
            found = f"{type(rotary).__name__}, not cosines and sines ({release()})"
            raise PatchError(f"the model's rotary positions are a {found}: the model is not known")
        if self._pass is not None:
            rotary[0].sfllava_fast_pass = self._pass  # a checkpointed layer is called again in backward, with these
        return getattr(rotary[0], "sfllava_fast_pass", None)


class _Forward:
    """What a module's `forward` is replaced by. An object, so that a copy of the model calls the copy's own."""

    def __init__(self, owner: Any, run: Callable[..., Any], number: int | None = None) -> None:
        self.owner, self.run, self.number = owner, run, number
        self.own = vars(owner).get("forward")  # as hooks of other libraries put it there
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
    """What `save` wrote beside the tensors, ratios by layer; ValueError for anything else."""
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
