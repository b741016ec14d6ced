"""Sessions about streams: answers as of the frames that are kept, or that were appended; evictions, faults, bounds."""

import gc
import weakref

import pytest
import torch
from tiny_engine import LAYOUT, QUESTION, Clip, count_calls, file_session, logits_of
from tiny_llava import byte_tokenizer

from sfllava_fast import SlowFastLlava
from sfllava_fast.errors import BackendError, ContextError, InputError, LayoutError, OutOfMemoryError
from sfllava_fast.model.prompts import Turn
from sfllava_fast.ops.stream import kept_frames
from sfllava_fast.video import open_video

OTHER = "Where does it go, and why so slowly?"
ASK = {"max_new_tokens": 4}
FRAMES = Clip(60).pictures
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32; logits are about 1, and products are summed in another order


def ask_file(model, frames, question=QUESTION):
    """The answer's token ids and first logits in such a session."""
    with file_session(model, frames) as session:
        return logits_of(model.pipeline, lambda: session.ask(question, **ASK))


def ask_stream(session, question=QUESTION, **more):
    return logits_of(session.pipeline, lambda: session.ask(question, **ASK, **more))


def push(session, frames, sizes=(1,)):
    """Push frames, so many at a time, over and over."""
    start = 0
    while start < len(frames):
        for size in sizes:
            if start < len(frames):
                session.push(frames[start : start + size])
            start += size


def appended(model, most=8, frames=(), sizes=(1,)):
    session = model.open_stream("append", frames=most)
    push(session, frames, sizes)
    return session


@pytest.fixture
def fast(load):
    """A model whose layout is per frame, so that a file's session is the oracle of what is appended."""
    model = load()
    model = model.with_layout(model.layout.only("fast"))
    return model


# --- frames kept


@pytest.mark.parametrize("family, dtype", [("vicuna", "float32"), ("mistral", "float32"), ("vicuna", "bfloat16")])
def test_a_stream_is_answered_bit_for_bit_as_the_frames_it_keeps(load, family, dtype):
    model = load(family, options={"dtype": dtype})
    model.pipeline.encoder.tower.frames_per_pass = 1  # a tower may round by how many frames run together
    session, seen, logits = model.open_stream(frames=8), 0, []
    for size in (1, 2, 5, 1, 9, 30, 3):
        session.push(FRAMES[seen : seen + size])
        seen += size
        kept = FRAMES[list(kept_frames(seen, 8))]
        ids, got = ask_stream(session)
        expected_ids, expected = ask_file(model, kept)
        assert torch.equal(got, expected) and ids == expected_ids
        assert session.seen == seen
        logits.append(got)
    assert not any(torch.equal(a, b) for a, b in zip(logits, logits[1:]))


def test_an_answer_tells_which_frames_of_the_stream_it_is_about(load):
    session = load(options={"projector": "commuted"}).open_stream(frames=6, name="camera")
    push(session, FRAMES[:21], (4,))
    answer = session.ask(QUESTION, **ASK)
    assert (answer.video, answer.layout, answer.projector) == ("camera", LAYOUT, "exact")
    assert answer.frames == [0, 4, 8, 12, 16, 20] and answer.slow_frames == [0, 8, 16]
    assert answer.tokens == {"slow": 54, "fast": 24, "total": 78}
    assert set(answer.seconds) == {"aggregate", "prefill", "generate"}


def test_what_is_prefilled_serves_until_other_frames_are_kept(load, monkeypatch):
    model = load()
    prefilled = count_calls(monkeypatch, model.pipeline.language, "prefill")
    session = model.open_stream(frames=4)
    session.push(FRAMES[:5])  # 0, 2, 4
    for question, times in ((QUESTION, 1), (OTHER, 1)):
        session.ask(question, **ASK)
        assert len(prefilled) == times
    session.push(FRAMES[5:6])
    session.ask(QUESTION, **ASK)
    assert len(prefilled) == 1
    cache = session._cache
    session.push(FRAMES[6:7])
    session.ask(QUESTION, **ASK)
    assert len(prefilled) == 2 and session._cache is cache


def test_a_released_stream_is_answered_alike(load):
    model = load(options={"max_sessions": 1})
    first, second = model.open_stream(frames=6), model.open_stream(frames=6)
    push(first, FRAMES[:9])
    push(second, FRAMES[30:50])
    expected = ask_stream(first)[1]
    ask_stream(second)
    assert first._cache is None and list(model.pipeline.sessions) == [second]
    assert torch.equal(ask_stream(first)[1], expected)


def test_a_stream_in_another_layout(load):
    model = load()
    session = model.open_stream(frames=5, layout="pool:each,stride2,stride2,mean")
    push(session, FRAMES[:5])
    answer = session.ask(QUESTION, **ASK)
    assert answer.layout == "pool:each,stride2,stride2,mean" and answer.tokens["total"] == 45
    with pytest.raises(ContextError, match="smaller layout than pool:each,each,each,max"):
        load(text={"max_position_embeddings": 512}).open_stream(frames=30, layout="pool:each,each,each,max")


# --- a memory


def memory(model, **settings):
    small = {"clip_layout": "clip:adaptive1,adaptive1,adaptive2,mean", "held_clips": 6, "shown_clips": 3}
    return model.open_stream("memory", frames=3, clip_frames=2, **small | settings)


def test_a_memory_shows_clips_before_the_recent_frames(load):
    model = load()
    session = memory(model)
    push(session, FRAMES[:20])
    answer = session.ask(QUESTION, **ASK)
    assert answer.frames == [17, 18, 19]
    assert answer.tokens == {"slow": 54, "fast": 12, "clips": 6, "total": 72}
    _, logits = ask_stream(session)
    prompt = model.pipeline.prompts.prompt(QUESTION)
    with torch.inference_mode():
        words = [model.pipeline.language.embed_tokens(ids) for ids in (prompt.before, prompt.after)]
        embeds = torch.cat([words[0], session.stream.tokens(), words[1]])[None]
        expected = model.checkpoint.model(inputs_embeds=embeds, logits_to_keep=1).logits[0]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_clips_are_shown_by_scores_or_by_the_question(load, monkeypatch):
    model = load()
    session = memory(model)
    push(session, FRAMES[:20])
    prefilled = count_calls(monkeypatch, model.pipeline.language, "prefill")
    clips = len(session.stream.clips)
    assert clips == 6
    first = ask_stream(session, scores=[1, 1, 1, 0, 0, 0])[1]
    last = ask_stream(session, scores=[0, 0, 0, 1, 1, 1])[1]
    merged = ask_stream(session)[1]
    assert len(prefilled) == 3
    assert torch.equal(ask_stream(session)[1], merged) and len(prefilled) == 3
    assert not any(torch.equal(a, b) for a, b in [(first, last), (last, merged), (first, merged)])
    ids = model.pipeline.prompts.tokenizer(QUESTION, add_special_tokens=False).input_ids
    question = model.pipeline.language.embed_tokens(ids).mean(0)
    chosen = session.stream.select(question=question)
    by_question = ask_stream(session, scores="question")[1]
    as_scores = [float(clip in chosen) for clip in session.stream.clips]
    assert torch.equal(by_question, ask_stream(session, scores=as_scores)[1])
    for scores, match in (([1.0], "scores must be 6 numbers"), ("recent", "scores must be numbers, .* not 'recent'")):
        with pytest.raises(InputError, match=match):
            session.ask(QUESTION, scores=scores, **ASK)
    assert torch.equal(ask_stream(session)[1], merged)


@pytest.mark.parametrize("mode", ["slowfast", "memory", "append"])
@pytest.mark.parametrize("frames", ["a", 0, 2.0, True])
def test_frames_of_a_stream_are_named_as_they_were_given(mode, frames, load):
    with pytest.raises(InputError, match=f"^frames must be an integer of at least 1, not {frames!r}"):
        load().open_stream(mode, frames=frames)


def test_a_memory_that_will_not_fit_the_context_is_refused_at_once(load):
    model = load(text={"max_position_embeddings": 512})
    memory(model)
    with pytest.raises(ContextError, match="exceed the context of 512"):
        memory(model, clip_layout="clip:adaptive1,each,each,mean", held_clips=20, shown_clips=12)


# --- frames appended


@pytest.mark.parametrize("family", ["vicuna", "mistral", "chatml"])
@pytest.mark.parametrize("sizes", [(1,), (12,), (1, 4, 2)])
def test_appended_frames_are_as_if_prefilled_at_once(load, family, sizes):
    model = load(family)
    model = model.with_layout(model.layout.only("fast"))
    session = appended(model, 12, FRAMES[:12], sizes)
    for question in (QUESTION, OTHER):
        _, logits = ask_stream(session, question)
        torch.testing.assert_close(logits, ask_file(model, FRAMES[:12], question)[1], **CLOSE)
        assert (logits - ask_file(model, FRAMES[1:12], question)[1]).abs().max() > 0.01
    answer = session.ask(QUESTION, **ASK)
    assert answer.frames == list(range(12)) and answer.tokens == {"slow": 0, "fast": 48, "total": 48}
    assert set(answer.seconds) == {"prefill", "generate"} and not answer.slow_frames


@pytest.mark.parametrize("seen", [9, 11, 24, 57])
@pytest.mark.parametrize("dtype, close", [("float32", CLOSE), ("float64", {"rtol": 1e-10, "atol": 1e-10})])
def test_evicted_frames_are_as_if_they_had_never_been(load, seen, dtype, close):
    """In a model of one layer, whose keys and values know nothing of other tokens but where they stand."""
    model = load(text={"num_hidden_layers": 1})
    model = model.with_layout(model.layout.only("fast"))
    if dtype == "float64":
        model.checkpoint.model.double()
        model.pipeline.encoder.dtype = model.pipeline.language.dtype = torch.float64
        model.pipeline.encoder.backend = "torch"
    session = appended(model, 8, FRAMES[:seen])
    assert seen - 8 <= session.frames[0] <= seen - 6 and session.frames[-1] == seen - 1 == session.seen - 1
    kept = FRAMES[session.frames]
    torch.testing.assert_close(ask_stream(session)[1], ask_file(model, kept)[1], **close)
    assert (ask_stream(session)[1] - ask_file(model, kept[1:])[1]).abs().max() > 0.01


FRAME_BY_FRAME = [
    "videollm_online", "videollm_online-interval", "llava_next_video-bilinear-newline_grid", "uniform",
    "pool:each,adaptive2,adaptive2,mean;comma@frame;newline@between;interval@between",
]  # fmt: skip


@pytest.mark.parametrize("layout", FRAME_BY_FRAME)
def test_any_layout_of_each_frame_by_itself_is_appended(load, layout):
    """Before and after evictions: class tokens, separators, pooling before the projector."""
    model = load(text={"num_hidden_layers": 1}).with_layout(layout)
    session = model.open_stream("append", frames=4)
    for seen in (1, 3, 5, 11):
        push(session, FRAMES[session.seen : seen], (2, 1))
        kept = FRAMES[session.frames]
        _, logits = ask_stream(session)
        torch.testing.assert_close(logits, ask_file(model, kept)[1], **CLOSE)
        assert session.tokens == model.pipeline.plan(len(kept)).tokens
    assert session.frames == [7, 8, 9, 10]


@pytest.mark.parametrize(
    "layout",
    [
        "videollm_online-interval", "llava_video_slowfast-every_3-newline_grid", "video_chatgpt", "pllava",
        "llava_next_video-max-newline_one",
    ],
)  # fmt: skip
def test_a_stream_is_kept_in_any_layout(load, layout):
    model = load(text={"max_position_embeddings": 8192}).with_layout(layout)
    session = model.open_stream(frames=6)
    push(session, FRAMES[:15], (4, 1))
    kept = FRAMES[list(kept_frames(15, 6))]
    ids, logits = ask_stream(session)
    expected_ids, expected = ask_file(model, kept)
    assert ids == expected_ids and torch.equal(logits, expected)


@pytest.mark.parametrize("mode, layout", [("slowfast", "ig_vlm"), ("append", "ig_vlm"), ("memory", "video_chatgpt")])
def test_layouts_that_a_stream_cannot_have(load, mode, layout):
    with pytest.raises(LayoutError, match=f"is not a layout for {mode} streams"):
        load().open_stream(mode, layout=layout)


def test_deeper_layers_remember_what_was_evicted(fast):
    pushed = [appended(fast, 8, frames) for frames in (FRAMES[:11], torch.cat([FRAMES[30:33], FRAMES[3:11]]))]
    assert [session.frames for session in pushed] == [list(range(4, 11))] * 2
    one, other = (ask_stream(session)[1] for session in pushed)
    assert (one - other).abs().max() > 1e-3
    alike = [appended(fast, 8, FRAMES[:11], sizes) for sizes in ((1,), (11,), (2, 3))]
    for session in alike:
        torch.testing.assert_close(ask_stream(session)[1], one, **CLOSE)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 8, 13])
def test_a_key_is_moved_four_times_at_most(fast, most, monkeypatch):
    session = fast.open_stream("append", frames=most)
    plain, moves = fast.pipeline.language.drop, {}

    def drop(*arguments):
        for frame in range(session.seen - len(session.frames), session.seen + 1):
            moves[frame] = moves.get(frame, -1) + 1  # its last is not a move: it is dropped
        plain(*arguments)

    monkeypatch.setattr(fast.pipeline.language, "drop", drop)
    push(session, FRAMES[: 3 * most + 2])
    assert len(session.frames) <= most and max(moves.values()) <= 4


@pytest.mark.parametrize("seen", [11, 57])
def test_moved_keys_of_16_bits_cost_no_more_than_16_bits_do(load, seen):
    def logits(dtype, ask):
        model = load(text={"num_hidden_layers": 1}, options={"dtype": dtype})
        model = model.with_layout(model.layout.only("fast"))
        session = appended(model, 8, FRAMES[:seen])
        return (ask_stream(session) if ask == "stream" else ask_file(model, FRAMES[session.frames]))[1].double()

    exact = logits("float32", "file")
    moved, still = (logits("bfloat16", ask) - exact for ask in ("stream", "file"))
    assert 0 < moved.norm() <= 2 * still.norm()


def test_a_question_costs_its_own_tokens_and_is_forgotten(fast, monkeypatch):
    session = appended(fast, 8, FRAMES[:20])
    first = ask_stream(session)
    prefilled = count_calls(monkeypatch, fast.pipeline.language, "prefill")
    extended = count_calls(monkeypatch, fast.pipeline.language, "extend")
    ask_stream(session, OTHER)
    assert not prefilled and extended[0][1].shape[1] == len(fast.pipeline.prompts.prompt(OTHER).after)
    again = ask_stream(session)
    assert again[0] == first[0] and torch.equal(again[1], first[1])
    session.push(FRAMES[20:21])
    assert not torch.equal(ask_stream(session)[1], first[1])


def test_a_follow_up_sees_the_earlier_turns(fast):
    session = appended(fast, 8, FRAMES[:8])
    said = session.ask(QUESTION, **ASK).text
    _, logits = ask_stream(session, OTHER, follow_up=True)
    assert [turn.question for turn in session.turns] == [QUESTION, OTHER]
    file = file_session(fast, FRAMES[:8])
    file.turns = [Turn(QUESTION, said)]
    _, expected = logits_of(fast.pipeline, lambda: file.ask(OTHER, follow_up=True, **ASK))
    torch.testing.assert_close(logits, expected, **CLOSE)
    session.ask(QUESTION, **ASK)
    assert [turn.question for turn in session.turns] == [QUESTION]


def test_the_cache_stays_where_it_is_and_grows_for_a_long_question_only(fast):
    session = appended(fast, 8, FRAMES[:8])
    ask_stream(session)
    place, held = session._cache.buffers[0].data_ptr(), session.nbytes
    for start in range(0, 60, 3):
        session.push(FRAMES[start : start + 3])
        ask_stream(session)
        assert session._cache.buffers[0].data_ptr() == place and session.nbytes <= held
    assert all(tokens.untyped_storage().nbytes() == tokens.nbytes for tokens in session._held.tokens)
    before = ask_stream(session)[1]
    long = ask_stream(session, "why " * 150)[1]
    assert session.nbytes > held
    fresh = appended(fast, 8, torch.cat([FRAMES[:8], FRAMES]))
    torch.testing.assert_close(ask_stream(fresh, "why " * 150)[1], long, **CLOSE)
    torch.testing.assert_close(ask_stream(session)[1], before, **CLOSE)


def test_frames_of_any_size(load):
    model = load()
    model.pipeline.encoder.tower.frames_per_pass = 1
    wide = torch.randint(0, 255, (2, 24, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for mode in ("slowfast", "memory", "append"):
        session = model.open_stream(mode, frames=8)
        session.push(FRAMES[:1])
        narrow = ask_stream(session)[1]
        session.push(wide.numpy())
        assert session.seen == 3 and not torch.equal(ask_stream(session)[1], narrow)


def test_choices_are_asked_behind_the_same_words(load):
    """Vicuna's prompt of multiple choice begins otherwise; what stands before the video is prefilled already."""
    model = load()
    model = model.with_layout(model.layout.only("fast"))
    session = appended(model, 8, FRAMES[:8])
    answer = session.ask(QUESTION, ["left", "right"], **ASK)
    _, logits = ask_stream(session, QUESTION, choices=["left", "right"])
    assert answer.choices == ["left", "right"]
    opened, asked = model.pipeline.prompts.prompt(QUESTION), model.pipeline.prompts.prompt(QUESTION, ["left", "right"])
    assert opened.before != asked.before
    with torch.inference_mode():
        words = [model.pipeline.language.embed_tokens(ids) for ids in (opened.before, asked.after)]
        embeds = torch.cat([words[0], *session._held.tokens, words[1]])[None]
        expected = model.checkpoint.model(inputs_embeds=embeds, logits_to_keep=1).logits[0]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_prompt_with_the_question_before_the_video_cannot_be_appended(load):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' }}{% endfor %}"
        "<image>{% endfor %}"
    )
    model = load(options={"prompt": "chat_template"})
    model.pipeline.prompts.tokenizer, model.pipeline.prompts.chat_template = tokenizer, None
    session = appended(model, 8, FRAMES[:2])
    with pytest.raises(InputError, match="words of the question before the video"):
        session.ask(QUESTION, **ASK)


# --- bounds


def test_a_stream_that_could_not_be_asked_when_full_is_refused_at_once(load):
    model = load(text={"max_position_embeddings": 512})
    with pytest.raises(ContextError, match="exceed the context of 512: lower max_new_tokens, or open .* fewer frames"):
        model.open_stream("append", frames=90)
    session = appended(model, 40, FRAMES[:2])
    with pytest.raises(ContextError, match="exceed the context of 512"):
        session.ask("why " * 60, **ASK)
    with pytest.raises(ContextError, match="exceed the context of 512"):
        session.ask(QUESTION, max_new_tokens=300)
    assert session.turns == [] and session.ask(QUESTION, **ASK).frames == [0, 1]
    with pytest.raises(ContextError, match="exceed the context of 512"):
        model.open_stream(frames=120)


def test_as_many_frames_as_fit_are_kept_where_nothing_is_said(load):
    model = load()
    session = model.open_stream("append")
    assert session.most == (2048 - len(session._head) - 256 - 128) // 4 - 1
    # Beyond 4096 positions a rotary embedding that rescales would be another one for every key.
    stretched = load(text={"max_position_embeddings": 4096})
    assert stretched.checkpoint.context == 8192
    session = stretched.open_stream("append")
    assert session.most == (4096 - len(session._head) - 256 - 128) // 4 - 1
    with pytest.raises(ContextError, match="exceed the context of 4096"):
        session.ask(QUESTION, max_new_tokens=400)


def test_no_position_lies_beyond_the_context(load):
    """Not even while one frame more than are kept is there."""
    model = load("mistral", text={"max_position_embeddings": 500})
    everything = "pool:each,each,each,max"  # 36 tokens a frame, more than the shortest question
    words = len(model.pipeline.prompts.shortest())
    most = (500 - words - 1) // 36 - 1
    with pytest.raises(ContextError):
        model.open_stream("append", frames=most + 1, layout=everything)
    session = model.open_stream("append", frames=most, layout=everything)
    highest = []

    def watch(_, arguments, named):
        positions = named["position_ids"] if "position_ids" in named else arguments[1]
        highest.append(int(positions.max()))

    model.pipeline.language.core.rotary_emb.register_forward_pre_hook(watch, with_kwargs=True)
    push(session, FRAMES[: most + 5], (most + 2, 1))
    session.ask("?", max_new_tokens=1)
    assert words + most * 36 <= max(highest) < 500


def test_a_scale_left_by_a_longer_prompt_is_forgotten(load):
    model = load(text={"max_position_embeddings": 4096})
    model = model.with_layout(model.layout.only("fast"))
    session = appended(model, 8, FRAMES[:12])
    expected = ask_stream(session)[1]
    stretch = model.pipeline.language.new_cache(1, 4200)
    for use in (lambda: None, lambda: session.push(FRAMES[12:13])):
        with torch.inference_mode():
            model.pipeline.language.prefill(stretch, torch.zeros(1, 4150, 32))
        use()
        got = ask_stream(session)[1]
        torch.testing.assert_close(got, expected, **CLOSE)
        expected, stretch.length = ask_stream(appended(model, 8, FRAMES[:13]))[1], 0


def test_layouts_that_pool_over_frames_cannot_be_appended(load):
    model = load()
    for layout in (LAYOUT, "clip:adaptive2,each,each,mean", "slowfast-slow_3frms_concat"):
        with pytest.raises(LayoutError, match="not laid out frame by frame"):
            model.open_stream("append", layout=layout)
    assert str(model.open_stream("append").pipeline.layout) == "slowfast-fast_2x2"


def test_settings_that_make_no_stream(load):
    model = load()
    with pytest.raises(InputError, match="unknown mode 'fast' of a stream: choose one of slowfast, memory, append"):
        model.open_stream("fast")
    for mode in ("slowfast", "memory", "append"):
        with pytest.raises(InputError, match="must be an integer of at least 1, not 0"):
            model.open_stream(mode, frames=0)
    model.pipeline.language.moves_keys = False
    with pytest.raises(BackendError, match="take another mode than append"):
        model.open_stream("append")


# --- faults

MODES = ["slowfast", "memory", "append"]


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_without_frames_cannot_be_asked(load, mode):
    session = load().open_stream(mode, frames=8)
    with pytest.raises(InputError, match="the stream has no frames yet: push some first"):
        session.ask(QUESTION, **ASK)
    session.push(FRAMES[:1])
    assert session.ask(QUESTION, **ASK).frames == [0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "frames", [FRAMES[0], FRAMES[:0], FRAMES[:2].float(), FRAMES[:2].permute(0, 3, 1, 2), [1, 2], None]
)
def test_frames_that_are_none_change_nothing(load, mode, frames):
    session = load().open_stream(mode, frames=8)
    session.push(FRAMES[:9])
    expected = ask_stream(session)[1]
    with pytest.raises(InputError, match=r"frames must be uint8 RGB \[T, H, W, 3\], not "):
        session.push(frames)
    assert session.seen == 9 and torch.equal(ask_stream(session)[1], expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_push_that_runs_out_of_memory_leaves_the_stream_as_it_was(load, mode, monkeypatch):
    model = load()
    session = model.open_stream(mode, frames=8)
    session.push(FRAMES[:9])
    expected = ask_stream(session)[1]

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(session.pipeline.encoder, "project", fail)
        with pytest.raises(OutOfMemoryError, match=r"in stage projector \(asked for 2.50 GiB\)"):
            session.push(FRAMES[9:12])
    assert session.seen == 9 and torch.equal(ask_stream(session)[1], expected)
    session.push(FRAMES[9:12])
    other = model.open_stream(mode, frames=8)
    other.push(FRAMES[:9])
    other.push(FRAMES[9:12])
    assert torch.equal(ask_stream(session)[1], ask_stream(other)[1])


@pytest.mark.parametrize("name, after", [("prefill", 0), ("prefill", 1), ("drop", 0), ("_turn", 0)])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_append_that_fails_anywhere_leaves_the_session_as_it_was(load, monkeypatch, name, after, error):
    """One layer, so that a cache that had to be prefilled again is the same."""
    model = load(text={"num_hidden_layers": 1})
    session = appended(model, 8, FRAMES[:11])
    assert len(session.frames) == 7
    expected, plain = ask_stream(session)[1], getattr(model.pipeline.language, name)
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) <= after:
            return plain(*arguments)
        if name == "drop":  # some layers have moved
            arguments[0].buffers[0][..., 20:, :] = 7.0
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.pipeline.language, name, fail)
        with pytest.raises((OutOfMemoryError, KeyboardInterrupt)):
            session.push(FRAMES[11:20])
    assert session.seen == 11 and session.frames == list(range(4, 11))
    torch.testing.assert_close(ask_stream(session)[1], expected, **CLOSE)
    session.push(FRAMES[11:20])
    torch.testing.assert_close(ask_stream(session)[1], ask_stream(appended(model, 8, FRAMES[:20]))[1], **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_answer_leaves_the_stream_as_it_was(load, mode):
    session = load().open_stream(mode, frames=8)
    session.push(FRAMES[:9])
    ids, expected = ask_stream(session)
    turns = list(session.turns)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(OTHER, on_token=interrupt, follow_up=True)
    assert session.turns == turns
    again = ask_stream(session)
    assert again[0] == ids and torch.equal(again[1], expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_stream_gives_everything_back(load, mode):
    model = load()
    with model.open_stream(mode, frames=8, name="camera") as session:
        session.push(FRAMES[:9])
        session.ask(QUESTION, **ASK)
        assert session.nbytes > 0
        assert list(model.pipeline.sessions) == ([] if mode == "append" else [session])
        gone = weakref.ref(session._held.tokens[0] if mode == "append" else session.stream)
    gc.collect()
    assert gone() is None
    assert session.closed and session.nbytes == 0 and not list(model.pipeline.sessions)
    for use in (lambda: session.ask(QUESTION), lambda: session.push(FRAMES[:1])):
        with pytest.raises(InputError, match="the session about camera is closed: open the video again"):
            use()


# --- the embedded model


def test_the_embedded_model_answers_about_a_stream():
    from sfllava_fast import embedded

    model, clip = SlowFastLlava.from_pretrained(), open_video(embedded.sample_video())
    frames = clip.frames(range(0, clip.total, 4))
    right = dict(zip(embedded.sample_questions(), embedded.sample_answers()))
    told = {}
    for mode in MODES:
        session = model.open_stream(mode)
        push(session, frames, (1, 3))
        told[mode] = sum(session.ask(question).text == answer for question, answer in right.items())
    assert told["slowfast"] == told["memory"] == len(right)
    assert told["append"] >= len(right) - 1  # the fast pathway alone cannot read the sign
