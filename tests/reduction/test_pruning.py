"""Pruning before the language model: what is kept, why, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_llava import tiny_config, tiny_model

from sfllava_fast.errors import InputError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.reduction.pruning import Pruning, layer_input, novelty, places, prune_tokens

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
GRID = (4, 4)
SEPARATED = "a:every2,stride2,stride2,mean+b:each,adaptive1,adaptive3,mean;newline@row;interval@between;interleaved"


def plan_of(layout=LAYOUT, frames=6, grid=GRID):
    return parse_layout(layout).plan(frames, grid)


def tokens_of(plan, width=16, seed=0):
    return torch.randn(plan.tokens["total"], width, generator=torch.Generator().manual_seed(seed))


def test_the_best_are_kept_in_their_order_and_of_equals_the_first():
    tokens = torch.arange(12.0).view(6, 2)
    pruned = prune_tokens(tokens, torch.tensor([0.0, 5, 1, 1, 7, 1]), 4)
    assert pruned.kept.tolist() == [1, 2, 3, 4] and pruned.tokens.equal(tokens[1:5])
    assert prune_tokens(tokens, torch.zeros(6), 3).kept.tolist() == [0, 1, 2]
    assert prune_tokens(tokens, torch.zeros(6), 6).tokens.equal(tokens)


def test_a_batch_is_its_rows():
    tokens, scores = torch.randn(3, 20, 4), torch.randn(3, 20)
    together = prune_tokens(tokens, scores, 7)
    for row in range(3):
        alone = prune_tokens(tokens[row], scores[row], 7)
        assert together.tokens[row].equal(alone.tokens) and together.kept[row].equal(alone.kept)


def test_gradients_reach_the_kept_tokens_alone():
    tokens = torch.randn(6, 2, requires_grad=True)
    weight = torch.randn(3, 2)
    pruned = prune_tokens(tokens, torch.tensor([3.0, 0, 2, 0, 0, 1]), 3)
    (pruned.tokens * weight).sum().backward()
    assert tokens.grad[[0, 2, 5]].equal(weight) and not tokens.grad[[1, 3, 4]].any()


def test_places_are_where_the_plan_puts_tokens():
    plan = plan_of(SEPARATED)
    separators = {row for row, _ in plan.separator_rows}
    found = sorted(place for index in places(plan) for place in index.flatten().tolist())
    assert found == sorted(set(range(plan.tokens["total"])) - separators) and separators
    slow, fast = places(plan)
    # Frame by frame: 2 rows of 2 tokens and a newline, 1 row of 3 and a newline, an interval; then a frame of b alone.
    assert slow.tolist() == [[0, 1, 3, 4], [16, 17, 19, 20], [32, 33, 35, 36]] and fast[:2].tolist() == [
        [6, 7, 8],
        [11, 12, 13],
    ]


@pytest.mark.parametrize("layout", [LAYOUT, SEPARATED, "videollm_online-interval", "pllava"])
def test_novelty_is_the_plain_greedy_choice(layout):
    plan = plan_of(layout)
    tokens = tokens_of(plan)
    want = np.full(len(tokens), -math.inf)
    unit = tokens.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    for index in places(plan):
        for column in index.T.tolist():
            others = sum(unit[at] for at in index[0].tolist() if at != column[0])
            want[column[0]] = -unit[column[0]] @ others / np.linalg.norm(others) if index.shape[1] > 1 else 0
            joined, most = [0], -1.0
            while len(joined) < len(column):
                near = {}
                for frame in sorted(set(range(len(column))) - set(joined)):
                    beside = [max(j for j in joined if j < frame), *[j for j in sorted(joined) if j > frame][:1]]
                    near[frame] = max(unit[column[frame]] @ unit[column[j]] for j in beside)
                new = min(near, key=near.get)
                most = max(most, near[new])
                want[column[new]] = -most
                joined.append(new)
    np.testing.assert_allclose(novelty(tokens, plan).numpy(), want, atol=2e-5)


def turned(plan, degrees):
    """Tokens in a plane: degrees(pathway, frame, place) from the first axis."""
    tokens = torch.zeros(plan.tokens["total"], 2)
    for pathway, index in enumerate(places(plan)):
        for frame, row in enumerate(index.tolist()):
            for place, at in enumerate(row):
                angle = math.radians(degrees(pathway, frame, place))
                tokens[at] = torch.tensor([math.cos(angle), math.sin(angle)])
    return tokens


def test_a_still_scene_costs_its_first_frame():
    plan = plan_of("pool:each,stride2,stride2,mean", 8)
    still = turned(plan, lambda pathway, frame, place: 20 * place)
    assert Pruning(below=1).kept(still, plan).tolist() == [0, 1, 2, 3]
    repeated = torch.randn(4, 192, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    assert Pruning(below=1).kept(repeated, plan).tolist() == [0, 1, 2, 3]
    assert Pruning(below=0.9).kept(torch.ones(32, 3), plan).tolist() == [0, 1, 2, 3]  # all are like their mean
    # Something passes at place 2 in frames 3 and 4: it is kept where it comes and where it has gone.
    passing = turned(plan, lambda pathway, frame, place: 20 * place + 60 * (place == 2 and frame in (3, 4)))
    assert Pruning(below=0.999).kept(passing, plan).tolist() == [0, 1, 2, 3, 4 * 3 + 2, 4 * 5 + 2]


def test_a_slow_fade_does_not_vanish():
    frames, step = 31, 3.0  # 90 degrees in all; neighbours are 0.9986 alike
    plan = plan_of("pool:each,stride2,stride2,mean", frames)

    def degrees(pathway, frame, place):
        return step * frame if place == 1 else 20 * place + 8 * (place == 2) * (frame % 2)

    tokens = turned(plan, degrees)
    kept = Pruning(below=math.cos(math.radians(15.5))).kept(tokens, plan)
    fade = [int(at) // 4 for at in kept if at % 4 == 1]
    assert (kept % 4).bincount().tolist() == [1, len(fade), 1, 1] and {0, 30} <= set(fade) and len(fade) <= 8
    assert all(min(abs(frame - there) for there in fade) * step <= 15.5 for frame in range(frames))
    # Place 2 changes more from frame to frame than the fade does: that is still no news beside it.
    later = [at for at in Pruning(10).kept(tokens, plan).tolist() if at >= 4]
    assert len(later) >= 6 and 4 * 30 + 1 in later and {at % 4 for at in later} == {1}


def test_pathways_are_compared_each_with_itself():
    plan = plan_of(LAYOUT, 6)
    tokens = turned(plan, lambda pathway, frame, place: 15 * place + 90 * pathway)
    slow, fast = places(plan)
    assert Pruning(below=0.999).kept(tokens, plan).tolist() == [*slow[0].tolist(), *fast[0].tolist()]


def test_separators_stay_beside_what_is_kept_or_go():
    plan = plan_of(SEPARATED)
    rows = {row for row, _ in plan.separator_rows}
    tokens = tokens_of(plan)
    kept = Pruning(5).kept(tokens, plan)
    assert len(kept) == Pruning(5).most(plan) == 5 + len(rows) and rows <= set(kept.tolist())
    without = Pruning(5, separators=False)
    assert set(without.kept(tokens, plan).tolist()) == set(kept.tolist()) - rows and without.most(plan) == 5
    by_similarity = Pruning(below=0.5, separators=False).kept(tokens, plan).tolist()
    assert by_similarity and not rows & set(by_similarity)
    assert rows < set(Pruning(below=0.5).kept(tokens, plan).tolist())


def test_zeros_that_make_up_for_frames_are_kept_last():
    plan = plan_of("video_chatgpt", 6)
    tokens = tokens_of(plan)
    tokens[plan.zeros] = 0
    made = plan.tokens["total"] - len(plan.zeros)
    assert not set(Pruning(made).kept(tokens, plan).tolist()) & set(plan.zeros)


def test_a_share_is_of_the_tokens_that_patches_are_pooled_into():
    plan = plan_of(SEPARATED)
    pooled = plan.tokens["total"] - len(plan.separator_rows)
    share = Pruning(0.3, separators=False)
    assert share.most(plan) == math.ceil(0.3 * pooled) == len(share.kept(tokens_of(plan), plan))
    assert Pruning(1.0).kept(tokens_of(plan), plan).tolist() == list(range(plan.tokens["total"]))


def test_norm_and_a_function():
    plan = plan_of()
    tokens = tokens_of(plan)
    order = np.argsort(-np.linalg.norm(tokens.numpy(), axis=1))
    assert Pruning(9, "norm").kept(tokens, plan).tolist() == sorted(order[:9].tolist())
    shortest = Pruning(9, lambda tokens, plan: -tokens.norm(dim=1)).kept(tokens, plan)
    assert shortest.tolist() == sorted(order[-9:].tolist())


@pytest.fixture(scope="module")
def models():
    """The same random weights on eager attention, which gives its matrix away, and on SDPA, which does not."""
    made = {}
    for attention in ("eager", "sdpa"):
        model = tiny_model(tiny_config("mistral", text={"num_hidden_layers": 3}))
        model.set_attn_implementation(attention)
        made[attention] = model
    return made


def received(model, parts, layer, queries, start, count):
    """The attention that `count` tokens from `start` on get from the last ones, by the matrix that eager attention
    makes."""
    decoder = model.get_decoder()
    maps = decoder(inputs_embeds=torch.cat(parts)[None], output_attentions=True).attentions
    return maps[layer][0, :, -queries:].mean((0, 1))[start : start + count]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("queries", [1, 4, 64])
@torch.no_grad()
def test_attention_is_the_matrix_that_was_never_made(models, layer, queries):
    plan = plan_of()
    tokens, before, question = (torch.randn(n, 32) for n in (plan.tokens["total"], 3, 7))
    for scorer, parts in (("question", [before, tokens, question]), ("attention", [before, tokens])):
        asked = min(queries, len(parts[-1]))
        want = received(models["eager"], parts, layer, asked, 3, len(tokens))
        for keep in (1, 10, len(tokens) - 1):
            pruning = Pruning(keep, scorer, layer=layer, queries=queries)
            kept = pruning.kept(tokens, plan, models["sdpa"].get_decoder(), before, question)
            assert kept.tolist() == sorted(want.topk(keep).indices.tolist())
            assert pruning.needs_decoder and pruning.needs_question == (scorer == "question")


@torch.no_grad()
def test_another_question_keeps_others(models):
    plan, decoder = plan_of(), models["sdpa"].get_decoder()
    tokens, one, other = (torch.randn(n, 32) for n in (plan.tokens["total"], 7, 7))
    first, second = (Pruning(8, "question").kept(tokens, plan, decoder, None, asked) for asked in (one, other))
    assert not first.equal(second)
    first, second = (Pruning(8, "attention").kept(tokens, plan, decoder, None, asked) for asked in (one, None))
    assert first.equal(second)


@torch.no_grad()
def test_only_the_layers_before_it_are_run_and_nothing_stays_behind(models):
    decoder, ran = models["sdpa"].get_decoder(), []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(decoder.layers)
    ]
    plan = plan_of()
    tokens = torch.randn(plan.tokens["total"], 32)
    Pruning(4, "attention", layer=2).kept(tokens, plan, decoder)
    assert ran == [0, 1]
    with pytest.raises(RuntimeError):
        layer_input(decoder, torch.randn(1, 5, 31), 0, 5, 2)
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)
    decoder(inputs_embeds=tokens[None])


@pytest.mark.parametrize(
    "text", ["64:similarity", "0.25:question", "below0.95:similarity", "7:norm", "8:question,layer=0,queries=1"]
)
def test_a_text_is_read_back(text):
    assert str(Pruning.parse(text)) == text
    assert Pruning.parse("8:norm,separators=0") == Pruning(8, "norm", separators=False)
    assert str(Pruning(8, separators=False)) == "8:similarity,separators=0"


def test_a_text_without_a_scorer_is_by_similarity():
    assert Pruning.parse("64") == Pruning(64, "similarity") and Pruning.parse("1.0") == Pruning(1.0)
    assert Pruning.parse("below0.9") == Pruning(below=0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pruning(), "needs either keep"),
        (lambda: Pruning(4, below=0.9), "needs either keep"),
        (lambda: Pruning(0), "keep must be an integer of at least 1, not 0"),
        (lambda: Pruning(-0.5), "ratio must be above 0"),
        (lambda: Pruning(float("nan")), "ratio must be above 0"),
        (lambda: Pruning("64"), "keep must be an integer"),
        (lambda: Pruning(4, "best"), "unknown scorer 'best'.*similarity, attention, question, norm"),
        (lambda: Pruning(below=1.5), "below must be above 0 and at most 1"),
        (lambda: Pruning(below=0.9, scorer="norm"), "with scorer='similarity'"),
        (lambda: Pruning(4, queries=0), "queries must be"),
        (lambda: Pruning.parse("many"), "cannot read the pruning 'many': write 64, 0.25 or below0.95"),
        (lambda: Pruning.parse("belowhalf"), "cannot read the pruning"),
        (lambda: Pruning.parse("8:norm,layers=2"), "cannot read the pruning"),
        (lambda: Pruning.parse("8:norm,keep=2"), "cannot read the pruning"),
        (lambda: Pruning.parse("8:norm,queries"), "cannot read the pruning"),
        (lambda: Pruning.parse("8:norm,queries=0"), "queries must be"),
        (lambda: Pruning.parse(""), "cannot read the pruning"),
        (lambda: prune_tokens(torch.zeros(3, 2), torch.zeros(3), 4), "keep=4, and there are 3 tokens"),
        (lambda: prune_tokens(torch.zeros(3, 2), torch.zeros(3), 0), "keep must be"),
        (lambda: prune_tokens(torch.zeros(3, 2), torch.zeros(2), 1), r"scores must be \[3\], one a token, not \[2\]"),
        (lambda: prune_tokens(torch.zeros(3, 2), torch.tensor([0, math.nan, 0]), 1), "NaN"),
        (lambda: prune_tokens(torch.zeros(3, 2), torch.ones(3) + 1j, 1), "real numbers, not torch.complex64"),
        (lambda: prune_tokens(torch.zeros(3, 2), [1, 2, 3], 1), "real numbers, not list"),
        (
            lambda: Pruning(4, lambda tokens, plan: tokens[:, 0] + 1j).kept(torch.zeros(48, 2), plan_of()),
            "real numbers",
        ),
        (lambda: Pruning(999).kept(tokens_of(plan_of()), plan_of()), "keep=999, and the layout makes 48 tokens"),
        (lambda: Pruning(4).kept(torch.zeros(5, 2), plan_of()), r"tokens must be \[48, D\], one video's, not \[5, 2\]"),
        (lambda: Pruning(4).kept(torch.full((48, 2), math.nan), plan_of()), "NaN"),
        (lambda: Pruning(4, lambda tokens, plan: tokens).kept(torch.zeros(48, 2), plan_of()), "scores must be"),
        (lambda: Pruning(4, "attention").kept(torch.zeros(48, 2), plan_of()), "needs the language model"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_input_with_a_model(models):
    plan, decoder = plan_of(), models["sdpa"].get_decoder()
    tokens = torch.randn(plan.tokens["total"], 32)
    with pytest.raises(InputError, match="needs the language model and a question"):
        Pruning(4, "question").kept(tokens, plan, decoder)
    with pytest.raises(InputError, match="layer=3, and the language model has 3"):
        Pruning(4, "attention", layer=3).kept(tokens, plan, decoder)
