"""The curve's examination: what it counts as right is what the model says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("transformers")
from bench.reduction.pruning_accuracy import PrunedModel
from sfllava_fast.embedded.training.batches import IGNORE


@pytest.fixture(scope="module")
def model():
    return PrunedModel()


@torch.inference_mode()
def test_right_is_what_greedy_decoding_says(model):
    clip = model.draw(0)
    assert clip.tokens.shape == (192, 192)
    kept = torch.tensor([3, 4, 50, 77, 100, 130, 131, 160])
    decoder, head = model.decoder, model.head
    targets = clip.targets.clone()
    for row, question in enumerate(clip.questions()):
        # Token by token, the whole sequence anew each time, without a cache.
        embeds = torch.cat([model.before, clip.tokens[kept], decoder.embed_tokens(question)])
        behind = torch.arange(len(question)) + len(model.before) + 192
        positions = torch.cat([torch.arange(len(model.before)), len(model.before) + kept, behind])
        for place in range(len(question) - 1, clip.ids.shape[1]):
            if clip.targets[row, place] == IGNORE:
                break
            # With neither mask nor cache transformers would take positions with gaps for several sequences.
            asked = {"position_ids": positions[None], "attention_mask": torch.ones(1, len(embeds)), "use_cache": False}
            hidden = decoder(inputs_embeds=embeds[None], **asked)
            targets[row, place] = head(hidden.last_hidden_state[:, -1]).argmax()
            embeds = torch.cat([embeds, decoder.embed_tokens(clip.ids[row, place + 1 : place + 2])])
            positions = torch.cat([positions, positions[-1:] + 1])
    said = clip._replace(targets=targets)
    assert model.answer(said, kept).all() and model.answer(said, kept.expand(16, -1)).all()
    right = model.answer(clip, kept)
    assert right.equal((targets == clip.targets).all(1)) and 0 < right.sum() < 16


@torch.inference_mode()
def test_pruned_in_place_with_all_tokens_is_the_plain_model(model, monkeypatch):
    clip, hidden = model.draw(1), []
    monkeypatch.setattr(model, "_is_right", lambda clip, states: hidden.append(states))
    every = torch.arange(192).expand(16, -1)
    model.answer(clip, every)
    model.answer_in_place(clip, model.enter(clip), every)
    model.answer_in_place(clip, model.enter(clip), every[:, :50])
    asked = torch.zeros(clip.ids.shape, dtype=torch.bool)
    for row, question in enumerate(clip.questions()):
        asked[row, : len(question)] = True
    torch.testing.assert_close(hidden[1][asked], hidden[0][asked], atol=1e-3, rtol=1e-3)
    assert (hidden[2][asked] - hidden[0][asked]).abs().max() > 0.1
