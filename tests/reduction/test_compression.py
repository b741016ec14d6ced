import weakref

import pytest
import torch
from tiny_llava import tiny_config, tiny_model
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from sfllava_fast.errors import CheckpointError, InputError
from sfllava_fast.model.transformers_release import cache_argument, cache_in
from sfllava_fast.reduction.compression import (
    Compression,
    Span,
    cache_bytes,
    compression_mask,
    compression_mask_mod,
    prefill_compressed,
)
from sfllava_fast.reduction.drop_tokens import drop_tokens
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths

WIDTH, LAYERS, VOCABULARY = 32, 3, 97
TWO = [Span(3, 13, 2), Span(16, 22, 1)]  # text, ten of a video, two tokens, text, six of a video, one token, text
CASES = {
    "one": (TWO[:1], 20),
    "two": (TWO, 30),
    "nothing before": ([Span(0, 8, 8)], 19),
    "nothing behind": ([Span(4, 9, 3)], 12),
    "one behind the other": ([Span(1, 5, 1), Span(6, 8, 2), Span(10, 11, 1)], 15),
    "none": ([], 9),
    "by row": ([[Span(3, 13, 2)], [], [Span(0, 4, 1), Span(5, 9, 4)]], 18),
}


def rows_of(spans):
    return spans if spans and isinstance(spans[0], list) else [spans]


def oracle(spans, length):
    """[B, S, S] by who reads whom: a video's tokens are read by the same video's and by its compression tokens."""
    allowed = torch.zeros(len(rows_of(spans)), length, length, dtype=torch.bool)
    for row, of_row in enumerate(rows_of(spans)):
        video, belongs = [None] * length, [None] * length
        for number, (start, stop, tokens) in enumerate(of_row):
            for at in range(start, stop):
                video[at] = belongs[at] = number
            for at in range(stop, stop + tokens):
                belongs[at] = number
        for query in range(length):
            for key in range(query + 1):
                allowed[row, query, key] = video[key] is None or belongs[query] == video[key]
    return allowed


@pytest.fixture(scope="module")
def model():
    """A Llama whose heads share keys, in float64, large enough that its answers vary."""
    return llama()


def llama(tied=False, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.1 if weight.dim() == 1 else WIDTH**-0.5)
    return model.requires_grad_(False)


def embeddings(rows, length, seed=1):
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_the_mask_is_the_definition(case):
    spans, length = CASES[case]
    mask = compression_mask(spans, length)
    assert mask.dtype == torch.bool and torch.equal(mask[:, 0], oracle(spans, length))
    added = compression_mask(spans, length, dtype=torch.bfloat16)
    least = torch.finfo(torch.bfloat16).min
    assert added.dtype == torch.bfloat16 and torch.equal(added == 0, mask) and torch.equal(added == least, ~mask)


@pytest.mark.parametrize("case", CASES)
def test_the_mask_of_a_part_is_its_part_of_the_mask(case):
    spans, length = CASES[case]
    whole = oracle(spans, length)
    for start, stop in [(0, length), (0, 2), (2, 7), (7, length), (length - 1, length)]:
        assert torch.equal(compression_mask(spans, length, (start, stop))[:, 0], whole[:, start:stop, :stop])


@pytest.mark.parametrize("case", CASES)
def test_flex_attention_is_told_the_same(case):
    spans, length = CASES[case]
    for start in (0, 5):
        rule = compression_mask_mod(spans, length, start)
        told = create_mask(rule, 3, 2, length - start, length, device="cpu")
        assert torch.equal(told, compression_mask(spans, length, (start, length)).expand(3, 2, -1, -1))


def test_flex_attention_computes_the_same():
    spans, length = CASES["by row"]
    query, key, value = torch.randn(3, 3, 2, length, 16, generator=torch.Generator().manual_seed(2))
    for part, of in ((spans, 3), (spans[0], None)):
        mask = create_block_mask(compression_mask_mod(part, length), of, None, length, length, device="cpu")
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=compression_mask(part, length))
        torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask), expected)


@pytest.mark.parametrize("case", ["one", "two", "nothing before", "nothing behind", "one behind the other", "none"])
def test_dropping_is_masking(model, case):
    spans, length = CASES[case]
    embeds = embeddings(2, length)
    masked = model(inputs_embeds=embeds, attention_mask=compression_mask(spans, length)).logits
    dropped = prefill_compressed(model, embeds, spans)
    behind = dropped.logits.shape[1]
    assert behind == length - (spans[-1].end if spans and spans[-1].end < length else 0)
    torch.testing.assert_close(dropped.logits, masked[:, -behind:], rtol=0, atol=1e-10)
    own = sum(stop - start for start, stop, _ in spans)
    assert cache_in(dropped).layers[-1].keys.shape[2] == length - own
    assert cache_in(dropped).get_seq_length() == length
    if spans and spans[-1].end < length:  # the mask matters
        plain = model(inputs_embeds=embeds).logits
        assert (plain - masked)[:, -1].abs().max() > 0.1


def test_a_masked_forward_goes_on_in_parts(model):
    spans, length = CASES["two"]
    embeds, cache, parts = embeddings(1, length), DynamicCache(), []
    whole = model(inputs_embeds=embeds, attention_mask=compression_mask(spans, length)).logits
    for start, stop in [(0, 9), (9, 14), (14, 29), (29, 30)]:
        mask = compression_mask(spans, length, (start, stop))
        part = model(inputs_embeds=embeds[:, start:stop], attention_mask=mask, **cache_argument(model, cache))
        parts.append(part.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_generate_goes_on_behind_a_dropped_video(model):
    spans, length = CASES["two"]
    embeds, question = embeddings(1, length), torch.tensor([[5, 6, 7]])
    cache = cache_in(prefill_compressed(model, embeds, spans))
    ids = torch.cat([torch.zeros(1, length, dtype=torch.long), question], 1)
    made = model.generate(
        ids, **cache_argument(model, cache), attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    words = made.sequences[:, length:]
    assert torch.equal(words[:, :3], question) and words[0, 3:].unique().numel() > 3
    sequence = torch.cat([embeds, model.get_input_embeddings()(words)], 1)
    mask = compression_mask(spans, sequence.shape[1])
    expected = model(inputs_embeds=sequence, attention_mask=mask).logits[:, length + 2 : -1]
    logits = torch.stack(made.logits, 1).double()  # generate rounds them to float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert cache.layers[0].keys.shape[2] == length - 16 + 3 + 8 - 1


def test_a_llava_model_drops_and_masks_alike():
    model = tiny_model(tiny_config("mistral")).double()
    embeds, spans = embeddings(1, 30), TWO
    masked = model(inputs_embeds=embeds, attention_mask=compression_mask(spans, 30)).logits
    torch.testing.assert_close(prefill_compressed(model, embeds, spans).logits, masked[:, 23:], rtol=0, atol=1e-10)


def test_dropped_tokens_give_their_memory_back_and_the_others_stay(model):
    cache = DynamicCache()
    model(inputs_embeds=embeddings(2, 40), **cache_argument(model, cache))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    held = [weakref.ref(rows) for layer in cache.layers for rows in (layer.keys, layer.values)]
    drop_tokens(cache, 2, 30)
    drop_tokens(cache, 33, 34)
    assert not any(rows() is not None for rows in held)
    left = torch.tensor([0, 1, 30, 31, 32, *range(34, 40)])
    for layer, (keys, values) in zip(cache.layers, before):
        assert torch.equal(layer.keys, keys[:, :, left]) and torch.equal(layer.values, values[:, :, left])
        for rows in (layer.keys, layer.values):
            assert rows.untyped_storage().nbytes() == rows.nbytes == 2 * 2 * 11 * 8 * 8  # rows, heads, places, width
    assert cache.get_seq_length() == 40
    plain = DynamicCache()
    model(inputs_embeds=embeddings(2, 11), **cache_argument(model, plain))
    plain.reset()
    cache.reset()
    assert cache.get_seq_length() == plain.get_seq_length()  # early releases of transformers keep it


def test_bytes_are_those_of_the_cache(model):
    spans, length = CASES["two"]
    cache = cache_in(prefill_compressed(model, embeddings(1, length), spans))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_bytes(model.config, length - 16, torch.float64)
    vicuna = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32)
    assert cache_bytes(vicuna, 3680) == 1840 * 2**20 and cache_bytes(vicuna, 4) == 2 * 2**20


def test_text_sees_a_video_through_the_tokens_alone(model):
    """Another video changes what follows; with the compression tokens' hidden states held fixed, it changes nothing."""
    spans, length = TWO[:1], 20
    span, fixed = spans[0], embeddings(LAYERS, 2, seed=5)
    videos = [embeddings(1, length)]
    videos.append(videos[0].clone())
    videos[1][:, 7] = 2.0

    def logits():
        return [model(inputs_embeds=embeds, attention_mask=mask).logits for embeds in videos]

    def hold(number):
        def hook(module, arguments, hidden):
            return torch.cat([hidden[:, : span.stop], fixed[number : number + 1], hidden[:, span.end :]], 1)

        return hook

    mask = compression_mask(spans, length)
    one, other = logits()
    changed = (one - other).abs().amax((0, 2)) > 0
    assert not changed[:7].any() and changed[7:].all()

    hooks = [layer.register_forward_hook(hold(number)) for number, layer in enumerate(model.model.layers)]
    try:
        one, other = logits()
        assert torch.equal(one[:, span.stop :], other[:, span.stop :]) and not torch.equal(one, other)
        mask = None
        one, other = logits()
        assert not torch.equal(one[:, span.end :], other[:, span.end :])
    finally:
        for hook in hooks:
            hook.remove()


def learned(k=2, seed=3, **settings):
    return Compression(embeddings(1, k, seed)[0], **settings)


@pytest.mark.parametrize("videos", [[(3, 13), (14, 20)], [[(3, 13), (14, 20)], [(0, 4), (8, 20)]]])
def test_tokens_are_put_in_behind_every_video(videos):
    compression, embeds = learned(), embeddings(2, 27)
    put, spans = compression.insert(embeds, videos)
    for row, (first, second) in enumerate(rows_of(videos) * (2 // len(rows_of(videos)))):
        parts = embeds[row, : first[1]], compression.tokens, embeds[row, first[1] : second[1]], compression.tokens
        assert torch.equal(put[row], torch.cat([*parts, embeds[row, second[1] :]]))
        for (start, stop), span in zip((first, second), spans[row]):
            assert torch.equal(put[row, span.start : span.stop], embeds[row, start:stop])
            assert torch.equal(put[row, span.stop : span.end], compression.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_training_sees_the_mask_in_every_attention(attention, monkeypatch):
    model, compression, embeds = llama(), learned(), embeddings(2, 27)
    videos = [[(3, 13)], [(5, 20)]]
    model.set_attn_implementation(attention)
    if attention == "flex_attention":  # transformers compiles it, which takes longer than all tests here
        import transformers.integrations.flex_attention as integration

        monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain_flex_attention)
    labels = torch.randint(VOCABULARY, (2, 27), generator=torch.Generator().manual_seed(4))
    labels[:, :21] = -100
    with torch.no_grad():  # no flex_attention on a CPU has a backward
        out = compression(model, embeds, videos, labels=labels)
    model.set_attn_implementation("sdpa")
    for row, of_row in enumerate(videos):
        put, spans = compression.insert(embeds[row : row + 1], of_row)
        alone = prefill_compressed(model, put, spans[0]).logits
        precision = 1e-5 if attention == "eager" else 1e-10  # its softmax is float32
        torch.testing.assert_close(out.logits[row : row + 1, spans[0][0].end :], alone, rtol=0, atol=precision)
    expected = F.cross_entropy(out.logits[:, 22:-1].flatten(0, 1), labels[:, 21:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False)


def plain_flex_attention(query, key, value, training=False, **arguments):
    return flex_attention(query, key, value, **arguments)


def test_gradients_reach_the_tokens_with_and_without_the_mask(model):
    compression, embeds = learned(), embeddings(1, 27)
    ways = {
        "masked": lambda: compression(model, embeds, [(3, 13)]).logits,
        "dropped": lambda: prefill_compressed(model, *parts()).logits,
    }

    def parts():
        put, spans = compression.insert(embeds, [(3, 13)])
        return put, spans[0]

    found = []
    for way in ways.values():
        compression.zero_grad()
        way()[:, -1].square().sum().backward()
        found.append(compression.tokens.grad.clone())
    assert (found[0].abs().amax(1) > 1e-3).all()
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_tokens_learn():
    """A frozen model's next word is steered through the tokens alone."""
    model, compression, embeds = llama(), learned(), embeddings(1, 27)
    optimizer, losses = torch.optim.Adam(compression.parameters(), 0.3), []
    labels = torch.full((1, 27), -100)
    labels[:, -1] = 11
    for _ in range(30):
        loss = compression(model, embeds, [(3, 13)], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_put_in_and_back(tied, tmp_path):
    model, trained = llama(tied).requires_grad_(), llama(tied, seed=7)
    names = ["embed_tokens.weight", "layers.1.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"]
    theirs = dict(trained.model.named_parameters()) | {"lm_head.weight": trained.lm_head.weight}
    path = learned(weights={name: theirs[name] for name in names}).save(tmp_path / "k2.safetensors")
    compression = Compression.load(path)
    assert torch.equal(compression.tokens, learned().tokens) and compression.tokens.requires_grad
    assert [file.name for file in tmp_path.iterdir()] == ["k2.safetensors"]

    before = dict(model.named_parameters(remove_duplicate=False))
    ids = torch.arange(9)[None]
    expected, plain = llama(tied), model(ids).logits
    full = [name if name == "lm_head.weight" else f"model.{name}" for name in names]
    assert not expected.load_state_dict(dict(zip(full, map(theirs.get, names))), strict=False).unexpected_keys
    with compression.install(model):
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert all(weight.requires_grad for weight in model.parameters())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        again = compression.install(model)  # as a notebook's cell would
        assert torch.equal(model(ids).logits, expected(ids).logits)
    again.undo()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert torch.equal(model(ids).logits, plain) and not torch.equal(plain, expected(ids).logits)


def test_weights_and_mixture_of_depths_leave_each_other_alone():
    model = llama()
    weight, layer = model.model.norm.weight, model.model.layers[1]
    mixture = MixtureOfDepths(model.float())
    put = learned(weights={"norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16)}).install(model)
    assert "forward" in vars(layer) and model.model.norm.weight is not weight
    assert model.model.norm.weight.dtype == torch.float32
    mixture.undo()
    assert "forward" not in vars(layer) and model.model.norm.weight is not weight
    put.undo()
    assert model.model.norm.weight is weight


def test_only_what_fits_is_installed():
    model = llama(tied=True)
    before = dict(model.named_parameters())
    other = {"embed_tokens.weight": torch.zeros(VOCABULARY, WIDTH), "lm_head.weight": torch.ones(VOCABULARY, WIDTH)}
    for compression, message in [
        (Compression(torch.zeros(2, WIDTH + 1)), "33 wide, the model's embeddings 32"),
        (learned(weights={"norm.weight": torch.ones(WIDTH), "norm.bias": torch.ones(WIDTH)}), "no norm.bias"),
        (learned(weights={"norm.weight": torch.ones(WIDTH + 1)}), r"no norm.weight \[33\]"),
        (learned(weights=other), "ties lm_head.weight"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            compression.install(model)
        assert "\n" not in str(raised.value)
        assert all(weight is before[name] for name, weight in model.named_parameters())


SPANS = {
    "overlap": ([Span(3, 13, 2), Span(14, 20, 1)], "overlaps"),
    "out of order": ([Span(16, 22, 1), Span(3, 13, 2)], "overlaps"),
    "outside": ([Span(3, 29, 2)], "not within 30 tokens"),
    "before the start": ([Span(-1, 13, 2)], "not within"),
    "empty": ([Span(3, 3, 1)], "empty"),
    "no tokens": ([Span(3, 13, 0)], "at least 1 compression token"),
    "more tokens than the video has": ([Span(3, 13, 11)], "at most as many as the video has"),
    "in one row": ([[Span(3, 13, 2)], [Span(3, 13, 0)]], "at least 1"),
}


@pytest.mark.parametrize("case", SPANS)
def test_spans_that_cannot_be(case, model):
    spans, message = SPANS[case]
    calls = [lambda: compression_mask(spans, 30), lambda: compression_mask_mod(spans, 30)]
    if isinstance(spans[0], Span):
        calls.append(lambda: prefill_compressed(model, embeddings(1, 30), spans))
    for call in calls:
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("queries", [(0, 31), (5, 5), (-1, 3)])
def test_queries_outside_of_the_sequence(queries):
    with pytest.raises(InputError, match="within the sequence's 30 tokens"):
        compression_mask(TWO, 30, queries)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([(3, 13), (12, 20)], "overlaps"),
        ([(3, 30)], "not within"),
        ([(3, 4)], "at most as many"),
        ([[(3, 13)], [(3, 13), (14, 20)]], "equally many videos"),
        ([[(3, 13)]] * 3, "must have 2 rows"),
    ],
)
def test_videos_that_cannot_be(videos, message):
    with pytest.raises(InputError, match=message):
        learned().insert(embeddings(2, 27), videos)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(0, 4), torch.zeros(4), torch.ones(2, 4).long(), torch.full((2, 4), float("nan"))]
)
def test_tokens_that_cannot_be(tokens):
    with pytest.raises(InputError, match=r"finite embeddings \[k, D\]"):
        Compression(tokens)


def test_a_file_that_is_none(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("tokens")
    for name in ("missing", "text", "other.safetensors", "."):
        with pytest.raises(CheckpointError, match="holds no compression tokens") as raised:
            Compression.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="cannot write the compression tokens"):
        learned().save(tmp_path / "no" / "where")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    path = learned().save(tmp_path / "k2.safetensors")
    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(InputError, match="no space left"):
        learned(k=3).save(path)
    assert list(tmp_path.iterdir()) == [path] and len(Compression.load(path).tokens) == 2


def test_a_cache_that_cannot_drop(model):
    cache = DynamicCache()
    model(inputs_embeds=embeddings(1, 20), **cache_argument(model, cache))
    drop_tokens(cache, 5, 9)
    layers, keys = list(cache.layers), cache.layers[0].keys
    for start, stop in [(4, 6), (8, 10), (9, 21), (12, 12), (13, 12), (-3, 2)]:
        with pytest.raises(InputError, match=r"the cache has \[9, 20\) to drop from"):
            drop_tokens(cache, start, stop)
    assert cache.layers == layers and cache.layers[0].keys is keys
    with pytest.raises(InputError, match=r"\[0, 0\)"):
        drop_tokens(DynamicCache(), 0, 1)
    static = StaticCache(config=model.config, max_cache_len=32)
    model(inputs_embeds=embeddings(1, 20), **cache_argument(model, static))
    with pytest.raises(InputError, match="a StaticLayer cannot drop tokens"):
        drop_tokens(static, 5, 9)


def test_attention_that_takes_no_mask():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 has no mask"):
        learned()(model, embeddings(1, 27), [(3, 13)])
