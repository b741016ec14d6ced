"""Scorers of vision tokens, each against its definition."""

import pytest
import torch
import torch.nn.functional as F
from mixture_oracle import allowed_pairs
from test_mixture import tiny
from torch import nn

from sfllava_fast.errors import InputError, PatchError
from sfllava_fast.reduction.scorers import (
    AttentionReceived,
    LayerExpert,
    LayerInput,
    Norm,
    TextSimilarity,
    make_scorers,
)


def layer_input(start=3, stop=9, total=12, mask=None):
    hidden = torch.randn(2, total, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return LayerInput(hidden, start, stop, nn.Module(), {"attention_mask": mask})


def test_norm_and_expert():
    given = layer_input()
    torch.testing.assert_close(Norm()(given).double(), given.hidden[:, 3:9].square().sum(-1).sqrt(), rtol=1e-5, atol=0)
    expert = LayerExpert(8)
    expected = (given.hidden[:, 3:9].float() * expert.linear.weight[0]).sum(-1) + expert.linear.bias
    torch.testing.assert_close(expert(given), expected)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "rows"])
def test_text_similarity_leaves_padding_out(kind):
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[1, ..., :2] = False
    masks = {"none": None, "bool": mask, "rows": mask[:, 0, -1].long()}
    masks["additive"] = torch.zeros(2, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = layer_input(mask=masks[kind])
    scores = TextSimilarity()(given)
    for row, hidden in enumerate(given.hidden.float()):
        pads = 2 if row == 1 and kind != "none" else 0
        mean = torch.cat([hidden[pads:3], hidden[9:]]).mean(0)
        expected = torch.stack([F.cosine_similarity(token, mean, dim=0) for token in hidden[3:9]])
        torch.testing.assert_close(scores[row], expected)


def test_text_is_needed():
    with pytest.raises(InputError, match='"text" needs text before or after .* prefill them with the question'):
        TextSimilarity()(layer_input(0, 12))
    with pytest.raises(InputError, match='"attention" needs text after'):
        AttentionReceived()(layer_input(3, 12))
    with pytest.raises(InputError, match="queries must be"):
        AttentionReceived(0)


def test_attention_that_is_not_known():
    given = layer_input()
    given.layer.self_attn = nn.MultiheadAttention(8, 2)
    given.layer.self_attn.scaling = 1.0
    with pytest.raises(PatchError, match=r"does not support MultiheadAttention \(transformers \d"):
        AttentionReceived()(given)


def test_attention_leaves_padding_out():
    """A row behind 7 tokens of padding scores as it does alone."""
    model = tiny(dtype=torch.float32)
    layer, hidden = model.model.layers[1], torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(hidden, torch.arange(20)[None])
    mask = allowed_pairs(20, padding=7)[None, None]
    scorer = AttentionReceived(2)
    padded = LayerInput(hidden, 9, 15, layer, {"position_embeddings": rotary, "attention_mask": mask})
    alone = {"position_embeddings": tuple(part[:, 7:] for part in rotary)}
    torch.testing.assert_close(scorer(padded), scorer(LayerInput(hidden[:, 7:], 2, 8, layer, alone)))
    unmasked = LayerInput(hidden, 9, 15, layer, {"position_embeddings": rotary})
    assert (scorer(padded) - scorer(unmasked)).abs().max() > 1e-3


def test_training_free_scorers_take_no_part_in_gradients():
    given = layer_input()
    given.hidden.requires_grad_()
    assert not Norm()(given).requires_grad and not TextSimilarity()(given).requires_grad


def test_scorers_by_name_module_function_and_layer():
    shared = Norm()
    assert list(make_scorers(shared, [1, 3], 8).values()) == [shared, shared]
    experts = make_scorers("learned", [1, 3], 8)
    assert experts["1"] is not experts["3"]
    assert experts["1"].linear.in_features == 8
    by_layer = make_scorers({1: "text", 3: lambda layer: layer.vision[..., 0]}, [1, 3], 8)
    given = layer_input()
    assert isinstance(by_layer["1"], TextSimilarity)
    assert torch.equal(by_layer["3"](given), given.hidden[:, 3:9, 0])
