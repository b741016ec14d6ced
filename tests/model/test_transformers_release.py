"""What differs between releases of transformers, on stand-ins of old and new ones: any release will do."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_llava import tiny_config, tiny_model
from torch import nn
from transformers import DynamicCache

from sfllava_fast.errors import PatchError
from sfllava_fast.model.attention import Attention
from sfllava_fast.model.generation import LanguageModel
from sfllava_fast.model.transformers_release import cache_argument, cache_in, name_of_cache
from sfllava_fast.reduction.compression import Span, prefill_compressed
from sfllava_fast.reduction.mixture.decoder_checks import find_decoder
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths


class Older(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.Identity()

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, **kwargs):
        return "older", past_key_values


class Newer(Older):
    def forward(self, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **kwargs):
        return "newer", cache


class Neither(Older):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        return "neither", None


class Wrapper(nn.Module):
    """Passes on what it is given, as those of other libraries do."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize("kind", [Older, Newer])
def test_a_cache_is_handed_over_by_the_name_that_the_model_takes(kind):
    cache = object()
    for model in (kind(), Wrapper(kind()), Wrapper(Wrapper(kind()))):
        assert model(None, **cache_argument(model, cache)) == (kind.__name__.lower(), cache)


def test_a_model_without_a_cache():
    for model in (nn.Linear(2, 2), Wrapper(Neither())):
        message = f"{type(model).__name__} takes no .*transformers {transformers.__version__}"
        with pytest.raises(PatchError, match=message):
            cache_argument(model, object())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_either_name(name):
    assert cache_in({"hidden_states": 1, name: 2}) == 2
    assert cache_in({"hidden_states": 1, name: None}) is None
    assert cache_in({"use_cache": True}) is None


def decoder_of(kind):
    decoder = nn.Module()
    decoder.layers, decoder.config = nn.ModuleList([kind(), kind()]), SimpleNamespace()
    return decoder


@pytest.mark.parametrize("kind", [Older, Newer])
def test_decoders_of_either_name_are_known(kind):
    decoder = decoder_of(kind)
    assert find_decoder(decoder) is decoder


def test_a_decoder_that_is_not_known_is_told_with_the_release():
    loaded = f"transformers {transformers.__version__}"
    with pytest.raises(PatchError, match=f"Neither does not take cache or past_key_values .{loaded}"):
        find_decoder(decoder_of(Neither))
    with pytest.raises(PatchError, match=f"no list of decoder layers .{loaded}"):
        find_decoder(nn.Linear(2, 2))


def rename_cache(model, monkeypatch):
    """As if the LLaVA model were the other release's: it and what is inside take and pass on the cache by that name."""
    inside = [model.model, model.model.language_model, *model.model.language_model.layers]
    stock = name_of_cache(inspect.signature(type(model).forward).parameters)
    other = {"cache": "past_key_values", "past_key_values": "cache"}[stock]

    def renamed(forward):
        def run(module, *args, **kwargs):
            assert stock not in kwargs
            return forward(module, *args, **{stock if name == other else name: kwargs[name] for name in kwargs})

        signature = inspect.signature(forward)
        parameters = [p.replace(name=other) if p.name == stock else p for p in signature.parameters.values()]
        run.__signature__ = signature.replace(parameters=parameters)
        return run

    def rename(_, args, kwargs):
        return args, {other if name == stock else name: value for name, value in kwargs.items()}

    for kind in {type(module) for module in (model, *inside)}:
        monkeypatch.setattr(kind, "forward", renamed(kind.forward))
    for module in inside:
        module.register_forward_pre_hook(rename, with_kwargs=True)
    return model


def mixed(model):
    ids = torch.arange(4, 34)[None]
    with MixtureOfDepths(model, 0.3) as mixture, mixture.on_frames((3, 11, 19)):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, **cache_argument(model, cache))
        held = [cache.get_seq_length(layer) for layer in range(4)]
        assert held[0] > held[1] > 0  # the layers that are not mixed hold every token
        return model(input_ids=ids[:, :2], **cache_argument(model, cache)).logits


def compressed(model):
    output = prefill_compressed(model, embeddings(30), [Span(2, 20, 3)])
    assert cache_in(output).get_seq_length() == 30
    return output.logits


def answered(model):
    language = LanguageModel(model, Attention("sdpa", "cpu", "test"))
    cache = language.new_cache(1, 30)
    language.prefill(cache, embeddings(20))
    logits = language.extend(cache, embeddings(5))
    return torch.tensor([*language.tokens(cache, logits, [cache.length], 4)])


def embeddings(count):
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
@pytest.mark.parametrize("run", [mixed, compressed, answered])
def test_either_name_computes_the_same(run, monkeypatch):
    model = tiny_model(tiny_config(text={"num_hidden_layers": 4}))
    expected = run(model)
    assert torch.equal(run(rename_cache(model, monkeypatch)), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_mixed_decoder_may_be_called_by_the_old_name():
    """As code does that has not changed yet, in releases that still take it."""
    decoder, found = tiny_model(tiny_config(text={"num_hidden_layers": 4})).model.language_model, []
    with MixtureOfDepths(decoder, 0.3) as mixture, mixture.on_frames((3, 11, 19)):
        for name in (*cache_argument(decoder, None), "past_key_values"):
            cache = DynamicCache(config=decoder.config)
            decoder(inputs_embeds=embeddings(30), **{name: cache})
            found.append(decoder(inputs_embeds=embeddings(2), **{name: cache}).last_hidden_state)
            assert cache.get_seq_length(1) == 14 + 2 * 3 + 2  # text, ceil(0.3 * 8) of each frame, text
    assert torch.equal(*found)
