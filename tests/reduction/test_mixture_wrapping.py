"""Mixture of depths: what is replaced on a model and put back, saved and loaded, and what cannot be served."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_mixture import FRAMES, prompt, tiny
from tiny_llava import tiny_config, tiny_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from sfllava_fast import patching as replacement
from sfllava_fast.errors import InputError, PatchError
from sfllava_fast.model.kv_cache import Filled
from sfllava_fast.model.transformers_release import cache_argument
from sfllava_fast.ops.token_offsets import placeholder_frames
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths


def attributes(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def logits(model, mixture=None, ids=None):
    ids = prompt() if ids is None else ids
    if mixture is None:
        return model(ids).logits
    with mixture.on_frames(FRAMES):
        return model(ids).logits


def test_undo_restores_every_attribute():
    model = tiny()
    model.model.layers[3].forward = model.model.layers[3].forward  # as hooks of other libraries leave it
    before, keys, plain = attributes(model), list(model.state_dict()), logits(model)
    with MixtureOfDepths(model, 0.3) as mixture:
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model, mixture), plain)
        assert torch.equal(logits(model), plain)  # no frames, no vision tokens
    assert attributes(model) == before
    mixture.undo()  # nothing left to do
    replacement.undo(model.model)
    assert torch.equal(logits(model), plain)


def test_wrapping_again_undoes_the_first():
    model = tiny()
    before = attributes(model)
    first = MixtureOfDepths(model, 0.3)
    second = MixtureOfDepths(model.model, 0.6, layers=[1])
    expected = logits(model, second)
    assert torch.equal(logits(model, first), logits(model))
    with first.on_frames(FRAMES):
        assert torch.equal(logits(model, second), expected)
    first.undo()
    assert torch.equal(logits(model, second), expected)
    second.undo()
    assert attributes(model) == before


def test_what_was_replaced_since_is_not_undone():
    model = tiny()
    mixture = MixtureOfDepths(model, 0.3)
    model.model.layers[1].forward = len
    with pytest.raises(PatchError, match="replaced again"):
        mixture.undo()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_is_wrapped_for_itself(copied):
    model = tiny()
    plain, mixture = logits(model), MixtureOfDepths(model, 0.3)
    expected = logits(model, mixture)
    model_2, mixture_2 = copied((model, mixture))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    assert torch.equal(logits(model_2, mixture_2), expected)
    mixture_2.undo()
    assert torch.equal(logits(model_2), plain)
    assert not torch.equal(logits(model, mixture), logits(model))


def test_saved_experts_are_loaded(tmp_path):
    model, path = tiny(), tmp_path / "experts.safetensors"
    mixture = MixtureOfDepths(model, {1: 0.25, 4: 0.5}, "learned")
    expected = logits(model, mixture)
    mixture.save(path)
    loaded = MixtureOfDepths.load(model, path)
    assert (loaded.ratios, loaded.weighted) == ({1: 0.25, 4: 0.5}, False)
    assert torch.equal(logits(model, loaded), expected)
    assert MixtureOfDepths.load(model, path, ratio=0.1).ratios == {1: 0.1, 4: 0.1}
    before = attributes(model)
    other = tmp_path / "other.safetensors"
    MixtureOfDepths(tiny(hidden_size=16), {1: 0.5}, "learned").save(other)
    with pytest.raises(InputError, match="LayerExperts of this model's width, 32"):
        MixtureOfDepths.load(model, other)
    from safetensors.torch import save_file

    save_file({"anything": torch.zeros(1)}, other)
    for wrong in (other, tmp_path / "missing"):
        with pytest.raises(InputError, match="has no scorers"):
            MixtureOfDepths.load(model, wrong)
    other.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="has no scorers"):
        MixtureOfDepths.load(model, other)
    assert attributes(model) == before


def test_experts_are_written_whole_or_not_at_all(tmp_path):
    mixture, kept = MixtureOfDepths(tiny(), 0.25, "learned"), tmp_path / "experts.safetensors"
    with pytest.raises(InputError, match="cannot write the scorers to"):
        mixture.save(tmp_path / "nowhere" / "experts.safetensors")
    assert mixture.save(kept) == kept and list(tmp_path.iterdir()) == [kept]


def test_weights_that_were_trained_with_experts_come_and_go_with_them(tmp_path):
    model, path = tiny(), tmp_path / "experts.safetensors"
    trained = {name: 1.5 * weight for name, weight in model.get_decoder().named_parameters() if ".1." in name}
    before, plain = attributes(model), logits(model)
    MixtureOfDepths(model, 0.25, "learned", weights=trained).save(path)
    loaded = MixtureOfDepths.load(model, path)
    found = logits(model, loaded)
    loaded.undo()
    assert attributes(model) == before and torch.equal(logits(model), plain)
    other = tiny()
    with torch.no_grad():
        for name, weight in trained.items():
            other.get_decoder().get_parameter(name).copy_(weight)
    expected = MixtureOfDepths(other, 0.25, "learned")
    expected.load_state_dict(loaded.state_dict())
    assert torch.equal(found, logits(other, expected)) and not torch.equal(found, plain)
    with pytest.raises(InputError, match="has no layers.9"):
        MixtureOfDepths(model, 0.25, weights={"layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert attributes(model) == before and torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ratio=0), "ratio must be"),
        (dict(ratio=1.5), "ratio must be"),
        (dict(ratio=float("nan")), "ratio must be"),
        (dict(ratio={1: 0.5}, layers=[3]), "give one"),
        (dict(ratio={}), "at least one"),
        (dict(layers=[]), "at least one"),
        (dict(layers=[1, 1]), "each once"),
        (dict(layers=[6]), "among 0 to 5"),
        (dict(layers=[-1]), "among 0 to 5"),
        (dict(layers=[0, 2]), "layer 0 must keep all tokens"),
        (dict(scorer="best"), "unknown scorer 'best'"),
        (dict(scorer=3), "unknown scorer 3"),
        (dict(scorer={1: "norm"}), "the scorers have layers"),
        (dict(layers=[2, 4], select_at=3), "select_at=3"),
        (dict(ratio={2: 0.5, 4: 0.2}, select_at=1), "one ratio"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    model = tiny()
    before = attributes(model)
    with pytest.raises(InputError, match=message):
        MixtureOfDepths(model, **arguments)
    assert attributes(model) == before


def test_a_model_too_shallow():
    with pytest.raises(InputError, match="at least one"):
        MixtureOfDepths(tiny(num_hidden_layers=1))


def test_layers_by_which_the_cache_is_measured_are_left_out():
    model = tiny("Gemma2")  # sliding, full, sliding, full, ...
    assert MixtureOfDepths(model).layers == (3, 5)
    with pytest.raises(InputError, match="layer 1 must keep all tokens"):
        MixtureOfDepths(model, layers=[1, 3])


def test_models_that_are_not_known():
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=1, vocab_size=10, n_positions=8))
    for model, found in ((clip, "CLIPTextModel"), (gpt, "GPT2"), (nn.Linear(2, 2), "Linear has no list")):
        before = attributes(model)
        with pytest.raises(PatchError, match=found):
            MixtureOfDepths(model)
        assert attributes(model) == before

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Identity()

        def forward(self, hidden_states, per_layer_input, attention_mask, position_embeddings, past_key_values):
            return hidden_states

    decoder = nn.Module()
    decoder.layers = nn.ModuleList([Layer(), Layer()])
    with pytest.raises(PatchError, match="Layer takes per_layer_input, which may be per token"):
        MixtureOfDepths(decoder)


@pytest.mark.parametrize(
    "scores",
    [
        lambda layer: layer.vision,
        lambda layer: layer.vision[..., 0] * float("nan"),
        lambda layer: layer.vision[:, 1:, 0],
        lambda layer: None,
    ],
)
def test_scores_that_cannot_be(scores):
    """The layer's cache is not written, and the wrapper goes on being of use."""
    model = tiny()
    mixture = MixtureOfDepths(model, 0.3, {1: "norm", 3: scores, 5: "norm"})
    cache = DynamicCache(config=model.config)
    with pytest.raises(InputError, match="scorer"), mixture.on_frames(FRAMES):
        model(prompt(), **cache_argument(model, cache))
    assert cache.get_seq_length(3) == 0
    mixture.scorers["3"] = mixture.scorers["1"]
    found = logits(model, mixture)
    assert torch.equal(found, logits(model, MixtureOfDepths(model, 0.3)))


def test_a_pass_that_nobody_goes_back_through_is_freed():
    """The scores' graph and what a checkpointed layer would need of the pass do not keep each other alive."""
    model, kept = tiny(), []
    mixture = MixtureOfDepths(model, 0.3, "learned").double()
    model.model.rotary_emb.register_forward_hook(lambda _, args, out: kept.append(weakref.ref(out[0])))
    assert logits(model, mixture).requires_grad
    gc.collect()
    assert kept[0]() is None


def test_what_a_forward_pass_cannot_serve():
    model, ids = tiny(), prompt()
    mixture = MixtureOfDepths(model, 0.3)
    static = StaticCache(config=model.config, max_cache_len=64)
    with mixture.on_frames(FRAMES):
        with pytest.raises(InputError, match="static cache"):
            model(ids, **cache_argument(model, static))
        with pytest.raises(InputError, match="packed"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 34]))
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(InputError, match="set_attn_implementation"):
            model(ids)
    sliding = tiny("Mistral, sliding")
    sliding.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="window of 9"), MixtureOfDepths(sliding, 0.3).on_frames(FRAMES):
        sliding(ids)


@torch.no_grad()
def test_a_cache_that_was_cut():
    model, ids = tiny(), prompt()
    mixture = MixtureOfDepths(model, 0.3)
    cache = DynamicCache(config=model.config)
    with mixture.on_frames(FRAMES):
        expected = model(ids, **cache_argument(model, cache)).logits
    cache.crop(-4)  # text alone: what is behind it goes on
    again = model(ids[:, -4:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(again, expected[:, -4:])
    for tokens in (12, 33):  # among the vision tokens, and before them
        cut = copy.deepcopy(cache)
        cut.crop(-tokens)
        with pytest.raises(InputError, match="start from an empty cache"):
            model(ids[:, :2], **cache_argument(model, cut))
    cache.reset()
    if not cache.get_seq_length():  # early releases keep zeros
        with mixture.on_frames(FRAMES):
            torch.testing.assert_close(model(ids, **cache_argument(model, cache)).logits, expected)


def test_frames_and_placeholders_that_cannot_be():
    model = tiny()
    mixture = MixtureOfDepths(model)
    for frames in ((), (3,), (3, 3), (5, 2), (-1, 4)):
        with pytest.raises(InputError, match="token_offsets must be"), mixture.on_frames(frames):
            pass
        with pytest.raises(InputError, match="token_offsets must be"):
            mixture.skipped(frames)
    ids = torch.tensor([[1, 9, 9, 2], [1, 9, 9, 4]])
    assert placeholder_frames(ids, [9]) == (1, 3)
    assert placeholder_frames(ids, [8]) is None
    for rows in ([[9, 1, 9, 2]], [[1, 9, 9, 2], [9, 9, 1, 2]]):
        with pytest.raises(InputError, match="several runs"):
            placeholder_frames(torch.tensor(rows), [9, 10])
    llava = tiny_model(tiny_config())
    with MixtureOfDepths(llava), pytest.raises(InputError, match="several runs"):
        llava(torch.tensor([[3, 1, 3, 3]]))


class Buffer(DynamicCache):
    """Counts tokens for itself, as the engine's does, and stops a pass once all keys and values are there."""

    def __init__(self, skipped, config):
        super().__init__(config=config)
        self.skipped, self.length = skipped, 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        found = super().update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx == len(self.skipped) - 1 and not self.length:
            raise Filled
        return found

    def get_seq_length(self, layer_idx=0):
        return max(0, self.length - self.skipped[layer_idx])


def test_a_cache_that_counts_for_itself_and_stops_the_pass():
    model, ids = tiny(attention="sdpa"), prompt()
    mixture = MixtureOfDepths(model, 0.3)
    cache = Buffer(mixture.skipped(FRAMES), model.config)
    expected = logits(model, mixture)
    with mixture.on_frames(FRAMES), pytest.raises(Filled):
        model(ids[:, :30], **cache_argument(model, cache))
    cache.length = 30
    torch.testing.assert_close(model(ids[:, 30:], **cache_argument(model, cache)).logits, expected[:, 30:])
