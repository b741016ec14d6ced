"""The key/value cache and the steps of generation, against transformers' own cache and loop."""

import pytest
import torch
from tiny_llava import tiny_config, tiny_model
from transformers import DynamicCache

from sfllava_fast.model import generation
from sfllava_fast.model.attention import Attention
from sfllava_fast.model.generation import LanguageModel
from sfllava_fast.model.transformers_release import cache_argument

FAMILIES = {
    "llama": {},
    "grouped heads": {"text": {"num_key_value_heads": 2}},
    "eager": {},
    "window": {"family": "mistral", "text": {"sliding_window": 12}},
}


@pytest.fixture(params=FAMILIES)
def language(request):
    torch.manual_seed(0)
    model = tiny_model(tiny_config(**FAMILIES[request.param]))
    if request.param == "eager":
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        yield LanguageModel(model, Attention("sdpa", "cpu", "test"))


def embeddings(language, *shape, seed=0):
    return torch.randn(*shape, language.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def expected_tokens(language, embeds, count):
    """Greedy tokens by transformers' own growing cache, all tokens at once."""
    held = cache_argument(language.core, DynamicCache(config=language.config))
    hidden = language.core(inputs_embeds=embeds[None], **held, use_cache=True).last_hidden_state
    ids = [int(language.head(hidden[0, -1]).argmax())]
    while len(ids) < count:
        step = torch.tensor([ids[-1:]])
        hidden = language.core(input_ids=step, **held, use_cache=True).last_hidden_state
        ids.append(int(language.head(hidden[0, -1]).argmax()))
    return ids


def test_prefill_and_extension_equal_one_pass(language):
    embeds = embeddings(language, 30)
    cache = language.new_cache(1, 64)
    language.prefill(cache, embeds[None, :21])
    assert cache.length == 21
    logits = language.extend(cache, embeds[None, 21:])
    got = [ids[0] for ids in language.tokens(cache, logits, [30], 12)]
    assert got == expected_tokens(language, embeds, 12) and len(set(got)) > 3


def test_prefill_leaves_the_last_layer_early(language):
    """Its keys and values are those of a full pass, and what comes after them is not computed."""
    ran = []
    last = language.core.layers[-1].mlp.register_forward_hook(lambda *_: ran.append(1))
    embeds = embeddings(language, 1, 15)
    early, full = language.new_cache(1, 20), language.new_cache(1, 20)
    language.prefill(early, embeds)
    assert not ran and not early.fill_only
    language.extend(full, embeds)
    last.remove()
    assert ran and all(map(torch.equal, early.buffers, full.buffers)) and early.length == full.length == 15


def test_setting_the_length_back_forgets(language):
    embeds = embeddings(language, 1, 20)
    cache = language.new_cache(1, 64)
    language.prefill(cache, embeds[:, :12])
    first = language.extend(cache, embeds[:, 12:])
    list(language.tokens(cache, first, [20], 9))
    cache.length = 12
    assert torch.equal(language.extend(cache, embeds[:, 12:]), first)


def test_rows_of_different_lengths_go_on_as_if_alone(language):
    lengths, after = [7, 19, 12], [5, 2, 9]
    rows = [embeddings(language, n + m, seed=n) for n, m in zip(lengths, after)]
    cache = language.new_cache(3, 19 + 9 + 10)
    for buffer in cache.buffers:
        buffer.fill_(3.0)  # what lies beyond a row's end must not count
    padded = torch.nn.utils.rnn.pad_sequence([row[:n] for row, n in zip(rows, lengths)], batch_first=True)
    language.prefill(cache, padded)
    logits = language.extend_rows(cache, [row[n:] for row, n in zip(rows, lengths)], lengths)
    steps = list(language.tokens(cache, logits, [n + m for n, m in zip(lengths, after)], 10))
    for row, ids in zip(rows, zip(*steps)):
        assert list(ids) == expected_tokens(language, row, 10)


def test_tokens_that_are_left_out_leave_no_place_and_move_no_position(language):
    """Against a full pass in which nobody sees them. Attention is told of no gap, which it would take for an end."""
    if getattr(language.config, "sliding_window", None):
        pytest.skip("counts tokens")
    kept, embeds = torch.tensor([[0, 1, 3, 4, 8, 9, 15, 16]]), embeddings(language, 1, 30)
    told = []
    for layer in language.core.layers:
        layer.register_forward_pre_hook(lambda _, args, seen: told.append(seen["position_ids"][0]), with_kwargs=True)
    cache = language.new_cache(1, 64, [12, 12])
    language.prefill(cache, embeds[:, kept[0]], kept)
    assert cache.length == 20 and [buffer.shape[3] for buffer in cache.buffers] == [52, 52]
    logits = language.extend(cache, embeds[:, 20:])
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    seen[:, [at for at in range(20) if at not in kept[0]]] = False
    mask = torch.zeros(30, 30).masked_fill(~(seen | torch.eye(30, dtype=torch.bool)), torch.finfo().min)
    hidden = language.core(inputs_embeds=embeds, attention_mask=mask[None, None], use_cache=False).last_hidden_state
    torch.testing.assert_close(logits, language.head(hidden[:, -1]), rtol=1e-4, atol=1e-4)
    assert all((places.diff() == 1).all() for places in told) and [len(told[0]), int(told[2][0])] == [8, 20]
    grown = [ids[0] for ids in language.tokens(cache, logits, [30], 9)]
    cache.length = 20
    logits = language.extend(cache, embeds[:, 20:])
    step = cache.step = generation.StaticStep(language, cache)
    step.start(logits.argmax(-1), [30])
    assert [int(logits.argmax()), *(int(step()) for _ in range(8))] == grown and len(set(grown)) > 3


def test_rows_are_taken_from_another_cache():
    language = LanguageModel(tiny_model(tiny_config()), Attention("sdpa", "cpu", "test"))
    with torch.inference_mode():
        source = language.new_cache(2, 16)
        language.prefill(source, embeddings(language, 2, 9))
        taken = language.new_cache(3, 24)
        taken.take(source, [1, 0, 1])
    assert taken.length == 9
    for row, of in enumerate([1, 0, 1]):
        for mine, theirs in zip(taken.buffers, source.buffers):
            assert torch.equal(mine[:, row, :, :9], theirs[:, of, :, :9]) and theirs[:, of, :, :9].all()
            assert not mine[:, row, :, 16:].any()


ROPES = {
    "default": {},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},  # scales its cos and sin
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def one_layer(rope, dtype, family="mistral"):
    text = {"num_hidden_layers": 1, "rope_parameters": {"rope_theta": 1e4} | ROPES[rope]}
    model = tiny_model(tiny_config(family, text=text)).to(dtype)
    return LanguageModel(model, Attention("sdpa", "cpu", "test"))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=str
)
def test_dropped_tokens_leave_the_others_as_if_they_had_never_been(rope, dtype, error):
    """In a model of one layer, whose keys and values know nothing of other tokens but where they stand."""
    language = one_layer(rope, dtype)
    embeds = embeddings(language, 1, 300).to(dtype)
    kept = torch.cat([embeds[:, :5], embeds[:, 45:]], dim=1)
    with torch.inference_mode():
        dropped, never = language.new_cache(1, 310), language.new_cache(1, 310)
        language.prefill(dropped, embeds)
        for count in (17, 3, 20):
            language.drop(dropped, 5, count)
        language.prefill(never, kept)
    assert dropped.length == never.length == 260
    (keys, values), (expected_keys, expected_values) = (cache.buffers[0][..., :260, :] for cache in (dropped, never))
    assert torch.equal(values, expected_values)
    assert torch.equal(keys[..., :5, :], expected_keys[..., :5, :])
    off = (keys - expected_keys).double().norm(dim=-1) / expected_keys.double().norm(dim=-1)
    assert off.max() < error


def test_a_model_whose_keys_cannot_be_moved_is_found_out(monkeypatch):
    from transformers.models.mistral import modeling_mistral

    assert one_layer("default", torch.float32).moves_keys and one_layer("yarn", torch.bfloat16).moves_keys
    pairs = lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # noqa: E731
    monkeypatch.setattr(modeling_mistral, "rotate_half", pairs)  # as GPT-J turns neighbouring channels
    assert not one_layer("default", torch.float32).moves_keys
    unplaced = one_layer("default", torch.float32)
    monkeypatch.setattr(unplaced.core, "rotary_emb", None)
    assert not unplaced.moves_keys


def test_bytes_of_a_token():
    language = LanguageModel(tiny_model(tiny_config("mistral")), Attention("sdpa", "cpu", "test"))
    token = 2 * 2 * 8 * 4  # keys and values, heads, width, float32; in each of two layers
    assert language.cache_bytes(5) == 5 * 2 * token and language.new_cache(3, 5).nbytes == 3 * 5 * 2 * token
    assert language.cache_bytes(5, [0, 2]) == language.new_cache(1, 5, [0, 2]).nbytes == (5 + 3) * token


def test_flash_attention_gives_way_where_a_mask_is_needed():
    language = LanguageModel(tiny_model(tiny_config()), Attention("flash_attention_2", "cuda", "test"))
    seen = []
    language.core.config._attn_implementation_internal = "flash_attention_2"
    with language._attention_that_takes_masks():
        seen.append(language.config._attn_implementation)
    assert seen == ["sdpa"] and language.config._attn_implementation == "flash_attention_2"


class FakeGraphs:
    """CUDA graphs as far as a host can see: what is captured does not run, and a replay runs it all."""

    def __init__(self, monkeypatch, fails=False):
        self.replays = self.captures = 0
        self.fails = fails
        monkeypatch.setattr(generation.torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(generation.torch.cuda, "graph", self.capture)

    def capture(self, graph, capture_error_mode):
        assert graph is self and capture_error_mode == "thread_local"
        return self

    def __enter__(self):
        self.captures += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.state = [tensor.clone() for tensor in self.tensors]

    def __exit__(self, *_):
        for tensor, was in zip(self.tensors, self.state):
            tensor.copy_(was)

    @property
    def tensors(self):
        return self.step.ids, self.step.positions, *self.step.cache.buffers

    def replay(self):
        self.replays += 1
        self.step._run()


def static_tokens(language, cache, logits, length, count):
    step = cache.step = cache.step or generation.StaticStep(language, cache)
    step.captures = True
    step.start(logits.argmax(-1), [length])
    return [int(logits.argmax(-1)), *(int(step()) for _ in range(count - 1))]


@pytest.mark.parametrize("fails", [False, True])
def test_a_captured_step_gives_the_same_tokens(language, monkeypatch, fails, caplog):
    graphs = FakeGraphs(monkeypatch, fails)
    embeds = embeddings(language, 17)
    cache = language.new_cache(1, 40)
    language.prefill(cache, embeds[None, :11])
    cache.step = graphs.step = generation.StaticStep(language, cache)
    for repeat in range(2):
        cache.length = 11
        logits = language.extend(cache, embeds[None, 11:])
        assert static_tokens(language, cache, logits, 17, 8) == expected_tokens(language, embeds, 8)
        if fails:
            assert graphs.replays == 0 and graphs.captures == repeat + 1
        else:
            assert graphs.captures == 1 and graphs.replays == [6, 13][repeat]
    assert ("cannot be captured in a CUDA graph (operation not permitted when" in caplog.text) == fails


def test_a_dynamic_rope_is_plain_within_its_positions():
    """And need not be asked for the longest position, which a capture could not do."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    text = {"rope_parameters": rope, "max_position_embeddings": 64}
    language = LanguageModel(tiny_model(tiny_config(text=text)), Attention("sdpa", "cpu", "test"))
    assert language.rescales(65) and not language.rescales(64)
    embeds = embeddings(language, 20)
    with torch.inference_mode():
        cache = language.new_cache(1, 60)
        logits = language.extend(cache, embeds[None])
        step = generation.StaticStep(language, cache)
        step.start(logits.argmax(-1), [20])
        kinds = []
        language.core.rotary_emb.register_forward_pre_hook(lambda module, _: kinds.append(module.rope_type))
        got = [int(logits.argmax(-1)), *(int(step()) for _ in range(9))]
        assert set(kinds) == {"default"} and language.core.rotary_emb.rope_type == "dynamic"
        assert got == expected_tokens(language, embeds, 10)


def test_one_row_on_a_cpu_has_no_static_step():
    language = LanguageModel(tiny_model(tiny_config()), Attention("sdpa", "cpu", "test"))
    with torch.inference_mode():
        cache = language.new_cache(1, 40)
        list(language.tokens(cache, language.extend(cache, embeddings(language, 1, 10)), [10], 5))
    assert cache.step is None
