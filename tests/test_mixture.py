"""Mixture of depths: what the wrapped model computes, against a model that computes everything and masks."""

import torch
import transformers
from mixture_oracle import llama_logits, logits_by_layers
from transformers import DynamicCache

from sfllava_fast.reduction.mixture import MixtureOfDepths

FRAMES = (3, 11, 19, 27)
TOTAL = 34


def tiny(family="Llama", attention="eager", dtype=torch.float64, **settings):
    """A small model with random weights, large enough that what is left out changes logits."""
    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, attn_implementation=attention,
    ) | settings
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 1.0 if "embed" in name else weight[0].numel() ** -0.5) if weight.dim() > 1 else None
    return model.to(dtype).eval()


def prompt(rows=1, total=TOTAL, seed=1):
    return torch.randint(1, 64, (rows, total), generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_prefill_equals_llama_written_out():
    model, ids = tiny(), prompt()
    plain = model(ids).logits
    expected = llama_logits(model, ids[0], FRAMES, {1: 0.3, 3: 0.3, 5: 0.3})
    with MixtureOfDepths(model, 0.3) as mixture, mixture.frames(FRAMES):
        found = model(ids, use_cache=False).logits
    close(found[0], expected)
    close(model(ids).logits, plain)
    assert (found - plain).abs().max() > 0.1


def test_cached():
    model, ids = tiny(), prompt()
    expected = logits_by_layers(model, ids, FRAMES, {1: 0.3, 3: 0.3, 5: 0.3})
    with MixtureOfDepths(model, 0.3) as mixture:
        cache = DynamicCache(config=model.config)
        parts = []
        with mixture.frames(FRAMES):
            for start, stop in ((0, 5), (5, 19), (19, 29)):
                parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
        for at in range(29, TOTAL):
            parts.append(model(ids[:, at:at+1], past_key_values=cache).logits)
        print([cache.get_seq_length(i) for i in range(6)])
    close(torch.cat(parts, 1), expected)
