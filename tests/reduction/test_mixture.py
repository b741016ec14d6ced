"""Mixture of depths: what the wrapped model computes, against a model that computes everything and masks."""

import copy
from functools import partial

import pytest
import torch
import transformers
from mixture_oracle import attention_score, llama_logits, logits_by_layers, norm_score
from tiny_llava import tiny_config, tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import flash_attention_mask

from sfllava_fast.model.transformers_release import cache_argument, cache_in
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths
from sfllava_fast.reduction.scorers import AttentionReceived

FRAMES = (3, 11, 19, 27)
TOTAL = 34
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mistral, sliding": {"sliding_window": 9},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {"eos_token_id": 1, "bos_token_id": 2},
    "Olmo2": {},
    "Gemma2": {"sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "Gemma3Text": {"sliding_window": 9},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"},
}


def tiny(family="Llama", attention="eager", dtype=torch.float64, **settings):
    """A small model with random weights, large enough that what is left out changes logits."""
    settings = (
        dict(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            max_position_embeddings=256,
            pad_token_id=0,
            attn_implementation=attention,
        )
        | FAMILIES[family]
        | settings
    )
    torch.manual_seed(0)
    name = family.split(",")[0]
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 1.0 if "embed" in name else weight[0].numel() ** -0.5)
    return model.to(dtype).eval()


def prompt(rows=1, total=TOTAL, seed=1):
    return torch.randint(1, 64, (rows, total), generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    """Stock models take the softmax and rotary angles in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_prefill_equals_a_llama_written_out():
    model, ids = tiny(), prompt()
    plain = model(ids).logits
    expected = llama_logits(model, ids[0], FRAMES, {1: 0.3, 3: 0.3, 5: 0.3})
    with MixtureOfDepths(model, 0.3) as mixture, mixture.on_frames(FRAMES):
        found = model(ids, use_cache=False).logits
    close(found[0], expected)
    assert (found - plain).abs().max() > 0.1
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_parts_and_decoding_equal_full_recomputation(family, attention):
    """Two rows, parts that end between frames, then single tokens: every logit, whatever each layer's cache lacks."""
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("transformers has no SDPA for Gemma 2")
    model, ids = tiny(family, attention), prompt(rows=2)
    mixture = MixtureOfDepths(model, 0.3)
    expected = logits_by_layers(model, ids, FRAMES, mixture.ratios)
    cache, logits = DynamicCache(config=model.config), []
    with mixture.on_frames(FRAMES):
        for part in (ids[:, :11], ids[:, 11:27], ids[:, 27:30]):
            logits.append(model(part, **cache_argument(model, cache)).logits)
    for token in ids[:, 30:].T:
        logits.append(model(token[:, None], **cache_argument(model, cache)).logits)
    close(torch.cat(logits, dim=1), expected)
    assert [cache.get_seq_length(at) for at in range(6)] == [TOTAL - count for count in mixture.skipped(FRAMES)]


def flash(module, query, key, value, attention_mask, scaling, position_ids=None, **_):
    """Attention as flash-attn's: causal from the last row up, padding by key; a gap in positions begins a sequence."""
    assert position_ids is None or bool((position_ids.diff() <= 1).all())
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("stand_in", flash)
transformers.AttentionMaskInterface.register("stand_in", flash_attention_mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "stand_in"])
@pytest.mark.parametrize("scorer", ["norm", "attention"])
def test_left_padding(attention, scorer):
    """Rows that begin behind padding keep their own positions, and padding takes part in no score."""
    model, ids = tiny(attention=attention, dtype=torch.float32), prompt(rows=2)
    paddings, frames, cut = [0, 7], (8, 14, 20, 26), 30  # the attention scorer asks the last token of the prefill
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    mixture = MixtureOfDepths(model, {1: 0.3, 3: 0.6}, scorer)
    score = {"norm": norm_score, "attention": attention_score}[scorer]
    expected = logits_by_layers(model, ids[:, :cut], frames, mixture.ratios, score, paddings)
    cache = DynamicCache(config=model.config)
    with mixture.on_frames(frames):
        prefill = dict(attention_mask=mask[:, :cut], position_ids=positions[:, :cut])
        found = model(ids[:, :cut], **cache_argument(model, cache), **prefill).logits
        close(found[0], expected[0])
        close(found[1, 7:], expected[1, 7:])
        if scorer == "norm":
            rest = {"attention_mask": mask, "position_ids": positions[:, cut:]}
            found = model(ids[:, cut:], **cache_argument(model, cache), **rest)
            expected = logits_by_layers(model, ids, frames, mixture.ratios, score, paddings)
            close(found.logits, expected[:, cut:])


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_received_is_the_layers_own(family, queries):
    if queries > 1 and FAMILIES[family].get("sliding_window"):
        pytest.skip("the queries see different windows")
    model, ids = tiny(family), prompt(rows=2)
    mixture = MixtureOfDepths(model, 0.3, AttentionReceived(queries))
    score = partial(attention_score, rows=slice(-queries, None))
    expected = logits_by_layers(model, ids, FRAMES, mixture.ratios, score)
    with mixture.on_frames(FRAMES):
        close(model(ids).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fastv(attention):
    """Of the whole video the tokens that layer 1's attention asks for, in all layers from 2 on, prefill and steps."""
    model, ids = tiny(attention=attention), prompt(rows=2)
    mixture = MixtureOfDepths.fastv(model, ratio=0.25, layer=2)
    ratios = dict.fromkeys(range(2, 6), 0.25)
    start, stop = FRAMES[0], FRAMES[-1]
    expected = logits_by_layers(model, ids[:, :30], (start, stop), ratios, attention_score, select_at=1)
    cache = DynamicCache(config=model.config)
    with mixture.on_frames(FRAMES):
        close(model(ids[:, :30], **cache_argument(model, cache)).logits, expected)
    assert [cache.get_seq_length(at) for at in range(6)] == [30, 30, 12, 12, 12, 12]
    assert mixture.skipped(FRAMES) == (0, 0, 18, 18, 18, 18)
    asked = partial(attention_score, rows=slice(29, 30))  # the prefill's last token
    stays = logits_by_layers(model, ids, (start, stop), ratios, asked, select_at=1)
    found = [model(token[:, None], **cache_argument(model, cache)).logits for token in ids[:, 30:].T]
    close(torch.cat(found, dim=1), stays[:, 30:])


def test_published_weighting():
    model, ids = tiny(), prompt(rows=2)
    scorer = {1: nn.Linear(32, 1).double(), 3: nn.Linear(32, 1).double()}
    ratio, layers = {1: 0.4, 3: 1}, list(model.model.layers)
    scorers = {at: lambda given, linear=linear: linear(given.vision)[..., 0] for at, linear in scorer.items()}
    mixture = MixtureOfDepths(model, ratio, scorers, weighted=True)

    def score(layer, hidden, **_):
        return scorer[layers.index(layer)](hidden)[0, :, 0]

    expected = logits_by_layers(model, ids, FRAMES, ratio, score, weighted=True)
    with mixture.on_frames(FRAMES):
        close(model(ids).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ratio_1_is_the_plain_model_bit_for_bit(attention):
    """Logits, gradients, caches and steps."""
    model, ids = tiny(attention=attention, dtype=torch.float32), prompt(rows=2)

    def everything():
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :30], **cache_argument(model, cache)).logits
        first.square().mean().backward()
        with torch.no_grad():
            step = model(ids[:, 30:], **cache_argument(model, cache)).logits
        kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return [first, step, *kept, *(weight.grad.clone() for weight in model.parameters())]

    expected = everything()
    with MixtureOfDepths(model, 1, "learned") as mixture, mixture.on_frames(FRAMES):
        found = everything()
    assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


def test_generate_with_placeholders_and_beams():
    """A LLaVA finds its own vision tokens in the prompt; beams reorder the cache; a second question goes on in it."""
    model = tiny_model(tiny_config(text={"num_hidden_layers": 4})).eval()
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 20, 21, *[3] * 36, 22, 23, 24]])
    settings = dict(input_ids=ids, pixel_values=pixels, max_new_tokens=8, no_repeat_ngram_size=1)
    settings |= dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    plain = model.generate(**settings)
    mixture = MixtureOfDepths(model, 0.2)
    found = model.generate(**settings)
    lengths = [layer.get_seq_length() for layer in cache_in(found).layers]
    assert lengths == [49, 49 - 28, 49, 49 - 28]
    assert not torch.equal(found.sequences, plain.sequences)
    uncached = model(found.sequences, pixel_values=pixels, use_cache=False).logits[:, 41:-1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), uncached, rtol=1e-4, atol=1e-4)
    beams = model.generate(**settings, num_beams=3, use_cache=True).sequences
    assert torch.equal(beams, model.generate(**settings, num_beams=3, use_cache=False).sequences)
    cache = copy.deepcopy(cache_in(found))
    follow = torch.tensor([[30, 31, 32]])
    whole = torch.cat([found.sequences[:, :-1], follow], dim=1)
    second = model(input_ids=follow, **cache_argument(model, cache)).logits
    torch.testing.assert_close(second, model(whole, pixel_values=pixels).logits[:, -3:], rtol=1e-4, atol=1e-4)
    mixture.undo()
    assert torch.equal(model.generate(**settings).sequences, plain.sequences)


def test_gradients_reach_the_scorer_straight_through():
    """The gradient of a block weighed by the score's sigmoid, taken at the unweighted output."""
    model, ids = tiny(), prompt(rows=2)
    mixture = MixtureOfDepths(model, 0.3, "learned", [1]).double()
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert [weight.shape for weight in mixture.parameters()] == [(1, 32), (1,)]
    seen = {}
    model.model.layers[1].register_forward_hook(lambda _, args, out: seen.update(entered=args[0], left=out))
    with mixture.on_frames(FRAMES):
        loss = model(ids).logits.square().mean()
    seen["left"].retain_grad()
    loss.backward()
    linear, vision = mixture.scorers["1"].linear, slice(FRAMES[0], FRAMES[-1])
    of_gate = (seen["left"].grad * (seen["left"] - seen["entered"])).sum(-1)[:, vision]
    entered = seen["entered"][:, vision]
    gate = linear(entered)[..., 0].sigmoid()
    of_score = of_gate * gate * (1 - gate)
    torch.testing.assert_close(linear.weight.grad[0], (of_score[..., None] * entered).sum((0, 1)))
    torch.testing.assert_close(linear.bias.grad[0], of_score.sum())
    assert linear.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_frozen_layers(reentrant):
    """The same gradients, though backward runs the layers again when the frames' context is left."""
    model, ids = tiny().train(), prompt(rows=2)
    mixture = MixtureOfDepths(model, 0.3, "learned").double()

    def gradients():
        model.zero_grad()
        mixture.zero_grad()
        with mixture.on_frames(FRAMES):
            loss = model(inputs_embeds=model.model.embed_tokens(ids), use_cache=False).logits.square().mean()
        loss.backward()
        return [weight.grad.clone() for weight in [*mixture.parameters(), *model.parameters()]]

    expected = gradients()
    renamed = getattr(model, "activation_checkpointing_enable", None)  # its name in newer releases
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    for found, plain in zip(gradients(), expected, strict=True):
        close(found, plain)
    assert all(weight.abs().max() > 0 for weight in expected[: len(list(mixture.parameters()))])


def test_autocast_trains_experts():
    model, ids = tiny(dtype=torch.float32), prompt()
    mixture = MixtureOfDepths(model, 0.3, "learned")
    with torch.autocast("cpu", torch.bfloat16), mixture.on_frames(FRAMES):
        model(ids).logits.square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in mixture.parameters())
    half = tiny(dtype=torch.bfloat16)
    mixture = MixtureOfDepths(half, 0.3, "learned")
    with mixture.on_frames(FRAMES):
        logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    logits.square().mean().backward()
    assert all(weight.grad.abs().max() > 0 for name, weight in mixture.named_parameters() if "weight" in name)
