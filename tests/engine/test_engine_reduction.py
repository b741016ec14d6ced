"""Reductions in the engine: sessions, batches and streams against full forward passes of a plain model."""

import json

import pytest
import torch
from PIL import Image
from tiny_engine import QUESTION, Clip, Unreadable, count_calls, file_session, logits_of

from sfllava_fast.cli.main import main
from sfllava_fast.errors import CheckpointError, ContextError, InputError
from sfllava_fast.ops.token_offsets import kept_of, token_frames
from sfllava_fast.reduction.compression import Compression
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths
from sfllava_fast.reduction.pruning import Pruning
from sfllava_fast.reduction.settings import CompressionFile, FastV, Mixture, parse_reduction

QUESTIONS = [QUESTION, "Where does it go, and why so slowly?", "Is it red?"]
LAYERS, K, WIDTH = 4, 3, 32
TINY = {"text": {"num_hidden_layers": LAYERS}}
ASK = {"max_new_tokens": 8}
SOME = ["mixture:0.3:LEARNED", "prune:30", "compress:TOKENS"]  # one of each kind
REUSED = [*SOME, "mixture:0.5:norm:2,3", "prune:0.4:attention", "prune:below0.99"]
ANEW = ["fastv:0.3", "mixture:0.3:text", "mixture:0.3:attention", "prune:30:question"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoints):
    """Learned scorers and compression tokens, random ones, for the tiny model."""
    from sfllava_fast import SlowFastLlava

    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(3)
    model = SlowFastLlava.from_pretrained(checkpoints(**TINY)).checkpoint.model
    with MixtureOfDepths(model, 0.3, "learned") as mixture:
        mixture.save(folder / "experts.safetensors")
    weight = model.get_decoder().layers[1].mlp.down_proj.weight
    trained = {"layers.1.mlp.down_proj.weight": weight + torch.randn_like(weight) / 8}
    Compression(torch.randn(K, WIDTH), trained).save(folder / "tokens.safetensors")
    return {"LEARNED": str(folder / "experts.safetensors"), "TOKENS": str(folder / "tokens.safetensors")}


@pytest.fixture
def reduced(load, files):
    """A model with a reduction, of which LEARNED and TOKENS are the files."""

    def reduced(reduction, **options):
        for name, file in files.items():
            reduction = reduction.replace(name, file) if isinstance(reduction, str) else reduction
        return load(options={"reduction": reduction} | options, **TINY)

    return reduced


@pytest.fixture
def plain(load):
    return load(**TINY)


@torch.inference_mode()
def expected_logits(plain, model, session, prompt, ids=()):
    """Logits behind a prompt and these tokens, by a plain model's layers on the whole sequence, without a cache."""
    after = plain.pipeline.language.embed_tokens([*prompt.after, *ids])
    reduction, start = model.pipeline.prefilling, len(prompt.before)
    video, before = session.video_tokens(), plain.pipeline.language.embed_tokens(prompt.before)
    if model.pipeline.prefilling.label.startswith(("mixture", "fastv")):
        frames = token_frames(session.source.plan, start)
        hidden = mixed_forward(plain, reduction.mixture, torch.cat([before, video, after])[None], frames, len(ids))
        return plain.pipeline.language.head(hidden[:, -1])
    if model.pipeline.prefilling.label.startswith("prune"):
        question = after[: len(prompt.after)]
        kept = model.pipeline.prefilling.pruning.kept(
            video, session.source.plan, plain.pipeline.language.core, before, question
        )
        hidden_from = torch.full((len(video),), 0).index_fill(0, kept, len(video) + start + len(after))
    else:
        compression = model.pipeline.prefilling.compression
        video = torch.cat([video, compression.tokens])
        hidden_from = torch.tensor([start + len(video)] * (len(video) - K) + [10**6] * K)
        weights = dict(plain.pipeline.language.core.named_parameters())
        for name, weight in compression.weights.items():
            weights[name].copy_(weight)
    embeds = torch.cat([before, video, after])[None]
    at = torch.arange(embeds.shape[1])
    seen = at <= at[:, None]
    seen[:, start : start + len(video)] &= at[:, None] < hidden_from
    seen |= at == at[:, None]  # what nobody sees must be a number nonetheless
    hidden = plain.pipeline.language.core(inputs_embeds=embeds, attention_mask=seen[None, None], use_cache=False)
    return plain.pipeline.language.head(hidden.last_hidden_state[:, -1])


def mixed_forward(plain, mixture, hidden, frames, generated):
    """Layer by layer: a mixed one on the rows that its scorer, asked again, would keep, and on all text."""
    core, total = plain.pipeline.language.core, hidden.shape[1]
    of_all = mixture.select_at is not None  # FastV's
    frames = (frames[0], frames[-1]) if of_all else frames
    cos, sin = core.rotary_emb(hidden, torch.arange(total)[None])
    for number, layer in enumerate(core.layers):
        if str(number) in mixture.scorers:
            scores = scores_of(mixture, number, hidden[:, : total - generated], frames, layer, (cos, sin))
            parts, ratio = [torch.arange(frames[0])], mixture.ratios[mixture.layers[0]]
            for first, stop in zip(frames, frames[1:]):
                best = scores[first - frames[0] : stop - frames[0]].topk(kept_of(ratio, stop - first))
                parts.append(first + best.indices.sort().values)
            kept = torch.cat([*parts, torch.arange(frames[-1], total)])
        rows = kept if number in mixture.layers else torch.arange(total)
        causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()[None, None]
        out = layer(hidden[:, rows], attention_mask=causal, position_embeddings=(cos[:, rows], sin[:, rows]))
        hidden = hidden.index_copy(1, rows, out)
    return core.norm(hidden)


def scores_of(mixture, number, hidden, frames, layer, rotary):
    from sfllava_fast.reduction.scorers import LayerInput

    rotary = tuple(part[:, : hidden.shape[1]] for part in rotary)
    at = LayerInput(hidden, frames[0], frames[-1], layer, {"position_embeddings": rotary})
    return mixture.scorers[str(number)](at)[0]


def check_against_full_forward(plain, model, session, question, **ask):
    turns = session.turns if ask.get("follow_up") else ()
    prompt = model.pipeline.prompts.prompt(question, turns=turns)
    ids, logits = logits_of(model.pipeline, lambda: session.ask(question, **ASK, **ask))
    expected = expected_logits(plain, model, session, prompt)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    last = expected_logits(plain, model, session, prompt, ids[:-1])[0]  # steps see what the first token did
    assert last[ids[-1]] > last.max() - 1e-3
    return logits


@pytest.mark.parametrize("reduction", [*REUSED, *ANEW])
def test_answers_are_those_of_a_full_forward_pass(reduced, plain, monkeypatch, reduction):
    model = reduced(reduction)
    prefilled = count_calls(monkeypatch, model.pipeline.language, "prefill")
    with model.open(Clip(), frames=9) as session:
        seen = [check_against_full_forward(plain, model, session, question) for question in QUESTIONS]
        seen += [check_against_full_forward(plain, model, session, QUESTION, follow_up=True)]
        assert len(prefilled) == (reduction in REUSED)
        first = check_against_full_forward(plain, model, session, QUESTION)
        assert torch.equal(first, seen[0])
        answer = session.ask(QUESTION, **ASK)
    assert answer.to_json()["reduction"] == model.pipeline.prefilling.label and answer.kept < answer.tokens["total"]
    unreduced = logits_of(plain.pipeline, lambda: plain.answer(Clip(), QUESTION, frames=9, **ASK))[1]
    assert (first - unreduced).norm() > 0.01 * unreduced.norm()  # it does something at all


@pytest.mark.parametrize("reduction", ["mixture:1", "prune:1.0", "prune:1.0:attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_leaves_nothing_out_is_bit_equal_to_the_plain_model(reduced, load, reduction, dtype):
    model, plain = reduced(reduction, dtype=dtype), load(options={"dtype": dtype}, **TINY)
    with model.open(Clip(), frames=9) as session, plain.open(Clip(), frames=9) as other:
        for question in QUESTIONS:
            ids, logits = logits_of(model.pipeline, lambda: session.ask(question, **ASK))
            expected, unreduced = logits_of(plain.pipeline, lambda: other.ask(question, **ASK))
            assert ids == expected and torch.equal(logits, unreduced)
        assert session.nbytes == other.nbytes and session.ask(QUESTION, **ASK).kept == session.tokens["total"]


def test_the_cache_holds_only_what_layers_keep(reduced):
    """By arithmetic of the test's own: 9 frames of 6x6 patches are 3 slow ones of 18 tokens and 9 fast ones of 4."""
    token = 2 * 4 * 8 * 4  # keys and values, heads, width, float32; in one layer
    kept = {"mixture:0.3": 3 * 6 + 9 * 2, "prune:30": 30, "compress:TOKENS": K}
    for reduction, count in kept.items():
        with reduced(reduction).open(Clip(), frames=9) as session:
            assert session.ask(QUESTION, **ASK).kept == count and session.tokens["total"] == 3 * 18 + 9 * 4 == 90
            places = [session._cache.capacity - 90 + count] * LAYERS
            places = places if reduction != "mixture:0.3" else [places[0] + 90 - count, places[0]] * 2
            if reduction == "compress:TOKENS":
                places = [session._cache.capacity - 90] * LAYERS  # they are there beside the video, and counted
            assert session._cache.nbytes == sum(places) * token
            assert session.nbytes == session._cache.nbytes + session._embeds.nbytes


@pytest.mark.parametrize("reduction", SOME)
def test_saved_released_and_moved_caches_go_on_alike(reduced, tmp_path, reduction):
    model = reduced(reduction)
    session = model.open(Clip(), frames=9)
    _, expected = logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))
    path = session.save(tmp_path / "clip.session")
    loaded = reduced(reduction).load_session(path)
    held = loaded._cache
    _, logits = logits_of(loaded.pipeline, lambda: loaded.ask(QUESTION, **ASK))
    assert held is not None and torch.equal(logits, expected) and loaded.nbytes == session.nbytes
    held = session._cache
    with torch.inference_mode():
        session._video_cache(
            session._embeds, session._length(session._embeds), held.capacity + 1
        )  # as a longer answer would
    assert session._cache is not held
    assert torch.equal(logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))[1], expected)
    session.release()
    assert torch.equal(logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))[1], expected)
    model.answer(Clip(12), QUESTION, frames=6, **ASK)  # leaves its cache to the next one, which skips other tokens
    assert torch.equal(logits_of(model.pipeline, lambda: model.answer(Clip(), QUESTION, frames=9, **ASK))[1], expected)


def test_a_session_belongs_to_its_reduction(reduced, plain, files, tmp_path):
    model = reduced("mixture:0.3")
    session = model.open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    path = session.save(tmp_path / "clip.session")
    for other in (plain, reduced("mixture:0.4"), reduced("prune:30"), reduced("mixture:0.3:LEARNED")):
        with pytest.raises(InputError, match="another model, prompt, dtype, layout or reduction"):
            other.load_session(path)
    torch.manual_seed(4)
    compression = Compression(torch.randn(K, WIDTH))
    told = {
        reduced(CompressionFile(files["TOKENS"])).pipeline.fingerprint(),
        reduced(compression).pipeline.fingerprint(),
    }
    assert len(told) == 2


@pytest.mark.parametrize("reduction", [*SOME, "prune:below0.99", "mixture:0.3:text"])
def test_batches_answer_as_one_by_one(reduced, reduction):
    """Three questions about two videos of the same length, and one about a shorter one."""
    model = reduced(reduction)
    first, second, short = Clip(), Clip(21), Clip(5)
    questions = [(first, QUESTIONS[0]), (short, QUESTIONS[0]), (second, QUESTIONS[1]), (first, QUESTIONS[2])]
    together = model.answer_batch(questions, frames=9, **ASK)
    for (clip, question), answer in zip(questions, together):
        alone = model.answer(clip, question, frames=9, **ASK)
        assert (answer.token_ids, answer.kept, answer.question) == (alone.token_ids, alone.kept, question)
    assert len({tuple(answer.token_ids) for answer in together}) > 1


@pytest.mark.parametrize("reduction", [*SOME, "mixture:0.3:text"])
def test_streams_answer_as_sessions_about_their_frames(reduced, reduction):
    model, frames = reduced(reduction), Clip().pictures
    model.pipeline.encoder.tower.frames_per_pass = 1  # a tower may round by how many frames run together
    with model.open_stream(frames=6) as stream:
        for count in (6, 20):
            stream.push(frames[stream.seen : count])
            _, logits = logits_of(model.pipeline, lambda: stream.ask(QUESTION, **ASK))
            with file_session(model, frames[stream.frames]) as session:
                assert torch.equal(logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))[1], logits)


def test_clips_of_a_memory_stream_are_frames(reduced, plain):
    model = reduced("mixture:0.3")
    memory = {"clip_frames": 2, "held_clips": 4, "shown_clips": 3}
    with model.open_stream("memory", frames=3, layout="slowfast-fast_4x4", **memory) as stream:
        stream.push(Clip().pictures)
        prompt = model.pipeline.prompts.prompt(QUESTION)
        _, logits = logits_of(stream.pipeline, lambda: stream.ask(QUESTION, **ASK))
        sizes = [len(clip.tokens) for clip in stream.stream.select()] + [16] * 3
        assert len(sizes) == 6 and sum(sizes) == stream.tokens["total"]
        frames = torch.tensor([len(prompt.before), *sizes]).cumsum(0).tolist()
        after = plain.pipeline.language.embed_tokens(prompt.after)[None]
        with torch.inference_mode():
            embeds = torch.cat([stream._embeds, after], dim=1)
            hidden = mixed_forward(plain, model.pipeline.prefilling.mixture, embeds, frames, 0)
            torch.testing.assert_close(logits, plain.pipeline.language.head(hidden[:, -1]), rtol=1e-4, atol=1e-4)
    pruned = reduced("prune:30").open_stream("memory", frames=3, **memory)
    pruned.push(Clip().pictures)
    with pytest.raises(InputError, match="a memory stream has others"):
        pruned.ask(QUESTION)


def test_appended_streams_take_none(reduced):
    with pytest.raises(InputError, match="append takes no reduction, such as mixture:0.3"):
        reduced("mixture:0.3").open_stream("append")


# --- faults, and the way back


@pytest.mark.parametrize("reduction", ["mixture:0.3", "mixture:0.3:text", "prune:30:attention", "compress:TOKENS"])
def test_an_interrupt_midway_leaves_session_and_model_as_they_were(reduced, reduction):
    model = reduced(reduction)
    session = model.open(Clip(), frames=9)
    _, expected = logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))
    embeds = torch.randn(1, 60, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outside = model.checkpoint.model(inputs_embeds=embeds).logits
    session.release()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.pipeline.language.core.layers[2].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION, **ASK)
    hook.remove()
    assert session._cache is None and not session.closed
    with torch.inference_mode():  # plain text goes through every layer whole, as before
        assert torch.equal(model.checkpoint.model(inputs_embeds=embeds).logits, outside)
    assert torch.equal(logits_of(model.pipeline, lambda: session.ask(QUESTION, **ASK))[1], expected)


@pytest.mark.parametrize("reduction", SOME)
def test_closing_gives_the_plain_model_back(reduced, plain, reduction):
    with reduced(reduction) as model:
        session = model.open(Clip(), frames=9)
        session.ask(QUESTION, **ASK)
    assert model.pipeline.sessions.spare is None and session._cache is None
    for asked in (session, model.open(Clip(), frames=9)):
        with pytest.raises(InputError, match="the model is closed"):
            asked.ask(QUESTION)
    assert not any("forward" in vars(module) for module in model.checkpoint.model.modules())
    for ours, theirs in zip(
        model.checkpoint.model.state_dict().items(), plain.checkpoint.model.state_dict().items(), strict=True
    ):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_positions_count_in_full(reduced, plain):
    """What is pruned keeps its place in the context; compression tokens come on top."""
    room = plain.checkpoint.context - 90 - len(plain.pipeline.prompts.prompt(QUESTION))
    for reduction, adds in (("prune:30", 0), ("mixture:0.3", 0), ("compress:TOKENS", K)):
        model = reduced(reduction)
        model.pipeline.check_context(model.pipeline.prompts.prompt(QUESTION), 90, 9, room - adds)
        with pytest.raises(ContextError, match="exceed the context"):
            model.open(Unreadable(), frames=9).ask(QUESTION, max_new_tokens=room + 1 - adds)


# --- settings, and what is said


def test_a_session_tells_which_tokens_it_keeps(reduced, plain):
    session = reduced("prune:30:attention").open(Clip(), frames=9)
    kept, answer = session.kept_tokens(), session.ask(QUESTION, **ASK)
    expected = Pruning(30, "attention").kept(
        session.video_tokens(),
        session.source.plan,
        plain.pipeline.language.core,
        session._embeds[0, : len(session._before)],
    )
    assert kept == expected.tolist() and len(kept) == answer.kept == 30
    asked = reduced("prune:30:question").open(Clip(), frames=9)
    assert asked.kept_tokens(QUESTIONS[1]) != asked.kept_tokens(QUESTIONS[2])
    assert reduced("mixture:0.3").open(Clip(), frames=9).kept_tokens() is None


@pytest.mark.parametrize(
    "text, settings",
    [
        ("mixture", Mixture()),
        ("mixture:0.2", Mixture(0.2)),
        ("mixture:0.5:norm:1,3", Mixture(0.5, "norm", (1, 3))),
        ("mixture::a/b.safetensors", Mixture(scorer="a/b.safetensors")),
        ("fastv", FastV()),
        ("fastv:0.25:3", FastV(0.25, 3)),
        ("prune:64", Pruning(64)),
        ("prune:0.25:attention", Pruning(0.25, "attention")),
        ("compress", CompressionFile()),
        ("compress:a/b.safetensors", CompressionFile("a/b.safetensors")),
    ],
)
def test_texts(text, settings):
    assert parse_reduction(text) == settings
    kind, _, rest = text.partition(":")
    if kind == "mixture":
        assert str(settings) == rest


@pytest.mark.parametrize(
    "text, said",
    [
        ("mix:0.2", "unknown reduction 'mix:0.2'"),
        ("mixture:2", "above 0 and at most 1"),
        ("mixture:nan", "above 0 and at most 1"),
        ("mixture:much", "cannot read the mixture 'much'"),
        ("mixture:0.2:norm:one", "cannot read the mixture"),
        ("mixture:0.2:norm:1:2", "cannot read the mixture"),
        ("mixture:0.2:a.safetensors:1", "leave out layers"),
        ("fastv:0", "above 0 and at most 1"),
        ("fastv:0.5:two", "write 0.5 or 0.5:2"),
        ("prune", "cannot read the pruning"),
        ("prune:0", "at least 1"),
        ("prune:64:beauty", "unknown scorer 'beauty'"),
    ],
)
def test_bad_texts_are_one_line_before_anything_is_loaded(text, said, capsys):
    assert main(["ask", "no video", "what?", "--reduction", text, "--model", "no model"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "reduction, error, said",
    [
        ("mixture:0.2:beauty", InputError, "unknown scorer"),
        ("mixture:0.2:norm:0", InputError, "layer 0"),
        ("mixture:0.2:norm:9", InputError, "layers must be among"),
        ("fastv:0.5:9", InputError, "layer"),
        ("mixture::TOKENS", InputError, "has no scorers"),
        ("compress", InputError, "name a file of them"),
        ("compress:nowhere.safetensors", CheckpointError, "nowhere.safetensors"),
        (3, InputError, "is no reduction"),
    ],
)
def test_a_model_that_cannot_be_reduced_says_why(reduced, reduction, error, said):
    with pytest.raises(error, match=said):
        reduced(reduction)


def test_more_than_there_is_cannot_be_kept(reduced):
    with pytest.raises(InputError, match="keep"):
        reduced("prune:91").answer(Clip(), QUESTION, frames=9)


def test_a_sliding_window_is_refused(load):
    text = {"sliding_window": 64, "num_hidden_layers": LAYERS}
    with pytest.raises(InputError, match="sliding window"):
        load("mistral", text=text, options={"reduction": "prune:30"})


def test_the_command_line_tells_what_was_kept(checkpoints, tmp_path, capsys):
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    arguments = ["ask", str(tmp_path), "what?", "--model", str(checkpoints(**TINY)), "--frames", "4"]
    arguments += ["--max-new-tokens", "3", "--reduction", "prune:30"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["reduction"], answer["kept"]) == ("prune:30:similarity", 30)
    assert main(arguments) == 0
    assert f"{answer['tokens']['total']:,}, 30 kept by prune:30:similarity" in capsys.readouterr().err
