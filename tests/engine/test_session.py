"""Sessions: a video prefilled once, answers as if asked afresh, bounded, saved, closed, and unharmed by faults."""

import gc
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_engine import LAYOUT, QUESTION, Clip, Unreadable, count_calls, logits_of

from sfllava_fast import SlowFastLlava
from sfllava_fast.engine import video_encoder
from sfllava_fast.errors import ContextError, InputError, OutOfMemoryError, VideoError
from sfllava_fast.model import tower
from sfllava_fast.model.prompts import Turn
from sfllava_fast.model.shipped import model_dir

QUESTIONS = ["What is it?", "Where does it go, and why so slowly?", "Is it red?"]
ASK = {"max_new_tokens": 12}


@pytest.fixture(params=["vicuna", "mistral", "chatml"])
def model(load, request):
    return load(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_bit_equal_to_asking_afresh(load, dtype):
    model = load(options={"dtype": dtype})
    with model.open(Clip(), frames=9) as session:
        for question in [*QUESTIONS, QUESTIONS[0]]:
            ids, logits = logits_of(model.pipeline, lambda: session.ask(question, **ASK))
            afresh, expected = logits_of(model.pipeline, lambda: model.answer(Clip(), question, frames=9, **ASK))
            assert ids == afresh and torch.equal(logits, expected)


def test_a_video_is_decoded_encoded_and_prefilled_once(model, monkeypatch):
    encoded = count_calls(monkeypatch, model.pipeline.encoder, "write_video")
    prefilled = count_calls(monkeypatch, model.pipeline.language, "prefill")
    session = model.open(Clip(), frames=9)
    answers = [session.ask(question, **ASK) for question in QUESTIONS]
    assert len(encoded) == len(prefilled) == 1
    assert {"decode", "preprocess", "vision", "projector", "aggregate"} <= set(answers[0].seconds)
    assert set(answers[1].seconds) == set(answers[2].seconds) == {"prefill", "generate"}


def test_choices_change_what_stands_before_the_video(load, monkeypatch):
    """The vicuna prompt of multiple choice begins otherwise: prefilled again, not encoded again."""
    model = load()
    encoded = count_calls(monkeypatch, model.pipeline.encoder, "write_video")
    session, choices = model.open(Clip(), frames=9), ["left", "right"]
    for question, options in ((QUESTION, None), (QUESTION, choices), (QUESTION, None)):
        expected = model.answer(Clip(), question, frames=9, choices=options, **ASK)
        encoded.clear()
        assert session.ask(question, options, **ASK).token_ids == expected.token_ids
    assert not encoded


def test_a_long_answer_moves_the_cache(model):
    session = model.open(Clip(), frames=9)
    first = session.ask(QUESTION, max_new_tokens=3)
    room = session._cache.capacity
    long = session.ask(QUESTION, max_new_tokens=room)
    assert session._cache.capacity > room
    assert long.token_ids[:3] == first.token_ids
    assert session.ask(QUESTION, max_new_tokens=3).token_ids == first.token_ids


def test_a_follow_up_sees_the_earlier_turns(model):
    session = model.open(Clip(), frames=9)
    first = session.ask(QUESTION, **ASK)
    second = session.ask(QUESTIONS[1], follow_up=True, **ASK)
    assert session.turns == [Turn(QUESTION, first.text), Turn(QUESTIONS[1], second.text)]
    prompt = model.pipeline.prompts.prompt(QUESTIONS[1], turns=session.turns[:1])
    assert QUESTION in prompt.text and second.prompt_tokens == len(prompt)
    assert second.prompt_tokens > model.open(Clip(), frames=9).ask(QUESTIONS[1], **ASK).prompt_tokens
    # The same conversation with another first answer is another conversation.
    other = model.open(Clip(), frames=9)
    other.ask(QUESTION, **ASK)
    other.turns = [Turn(QUESTION, "something else altogether")]
    assert other.ask(QUESTIONS[1], follow_up=True, **ASK).token_ids != second.token_ids
    # A question that is no follow-up begins anew.
    third = session.ask(QUESTIONS[2], **ASK)
    assert session.turns == [Turn(QUESTIONS[2], third.text)]
    assert third.token_ids == model.answer(Clip(), QUESTIONS[2], frames=9, **ASK).token_ids


def test_a_conversation_longer_than_the_context_is_refused(load):
    session = load(text={"max_position_embeddings": 512}).open(Clip(), frames=4)
    session.ask("?", max_new_tokens=2)
    turns = list(session.turns)
    with pytest.raises(ContextError, match="exceed the context of 512"):
        session.ask("why " * 100, max_new_tokens=2, follow_up=True)
    assert session.turns == turns


def test_positions_that_are_rescaled_are_prefilled_afresh(load):
    """Beyond 4096 tokens a dynamic rotary embedding depends on the prompt's length: the stock model is the oracle."""
    model = load(text={"max_position_embeddings": 4096})
    model = model.with_layout("slowfast-slow_50frms_concat-fast_6x6")
    session = model.open(Clip(50), frames=50)  # 3600 tokens
    short, long = QUESTION[:2], QUESTION * 30
    for question in (short, long, short, long):
        _, logits = logits_of(model.pipeline, lambda: session.ask(question, max_new_tokens=2))
        after = model.pipeline.language.embed_tokens(model.pipeline.prompts.prompt(question).after)[None]
        embeds = torch.cat([session._embeds, after], dim=1)
        assert model.pipeline.language.rescales(embeds.shape[1]) == (question == long)
        model.pipeline.language.forget_scale()
        with torch.inference_mode():
            expected = model.checkpoint.model(inputs_embeds=embeds, logits_to_keep=1).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# --- bounds


def test_the_least_recently_used_sessions_are_released(load):
    model = load(options={"max_sessions": 2})
    sessions = [model.open(Clip(total), frames=9) for total in (10, 15, 20)]
    answers = [session.ask(QUESTION, **ASK).token_ids for session in sessions[:2]]
    sessions[0].ask(QUESTION, **ASK)
    answers.append(sessions[2].ask(QUESTION, **ASK).token_ids)
    assert [session._cache is not None for session in sessions] == [True, False, True]
    assert list(model.pipeline.sessions) == [sessions[0], sessions[2]]
    assert [session.ask(QUESTION, **ASK).token_ids for session in sessions] == answers


def test_sessions_are_bounded_in_bytes(load):
    free = load()
    one = free.open(Clip(10), frames=9)
    one.ask(QUESTION, **ASK)
    model = load(options={"max_session_bytes": int(2.5 * one.nbytes)})
    sessions = [model.open(Clip(total), frames=9) for total in (10, 15, 20)]
    for session in sessions:
        session.ask(QUESTION, **ASK)
        assert sum(s.nbytes for s in model.pipeline.sessions) <= 2.5 * one.nbytes
    assert [session._cache is not None for session in sessions] == [False, True, True]
    # A bound that is too small for one still lets it answer.
    tight = load(options={"max_session_bytes": 1})
    assert tight.open(Clip(10), frames=9).ask(QUESTION, **ASK).text is not None


def test_the_spare_cache_counts_among_the_bytes(load):
    one = load().open(Clip(10), frames=9)
    expected = one.ask(QUESTION, **ASK).token_ids
    model = load(options={"max_session_bytes": int(1.5 * one.nbytes)})

    def held():
        return [model.pipeline.sessions.spare is not None, *(session._cache is not None for session in sessions)]

    sessions = []
    model.answer(Clip(10), QUESTION, frames=9, **ASK)
    assert held() == [True]
    spare = model.pipeline.sessions.spare
    sessions.append(model.open(Clip(10), frames=9))
    assert sessions[0].ask(QUESTION, **ASK).token_ids == expected and sessions[0]._cache is spare
    sessions.append(model.open(Clip(15), frames=9))  # which leaves its cache, beside the first one's, to nobody
    sessions[1].ask(QUESTION, **ASK)
    assert held() == [False, False, True]
    sessions[1].close(spare=True)
    assert held() == [True, False, False]
    sessions[0].ask(
        QUESTION, max_new_tokens=model.pipeline.sessions.spare.capacity
    )  # for which the spare one is too small
    assert held() == [False, True, False]
    # One that the bound has no room for is not kept.
    tight = load(options={"max_session_bytes": 1})
    tight.answer(Clip(10), QUESTION, frames=9, **ASK)
    assert tight.pipeline.sessions.spare is None


def test_a_spare_cache_goes_before_a_session(load, tmp_path):
    one = load().open(Clip(10), frames=9)
    one.ask(QUESTION, **ASK)
    model = load(options={"max_session_bytes": int(2.1 * one.nbytes)})
    session = model.open(Clip(10), frames=9)
    session.ask(QUESTION, **ASK)
    saved = session.save(tmp_path / "clip.session")
    model.answer(Clip(15), QUESTION, frames=9, **ASK)
    assert session._cache is not None and model.pipeline.sessions.spare is not None
    loaded = model.load_session(saved)
    assert session._cache is not None and loaded._cache is not None and model.pipeline.sessions.spare is None


def test_a_session_nobody_holds_is_gone(load):
    model = load()
    session = model.open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None and not list(model.pipeline.sessions)


def test_a_closed_session_gives_everything_back(load):
    model = load()
    with model.open(Clip(), frames=9) as session:
        session.ask(QUESTION, **ASK)
        assert session.nbytes > 0 and list(model.pipeline.sessions) == [session]
    assert session.closed and session.nbytes == 0 and not list(model.pipeline.sessions)
    for use in (lambda: session.ask(QUESTION), lambda: session.save("x")):
        with pytest.raises(InputError, match="the session about clip is closed: open the video again"):
            use()


def test_one_answer_after_another_uses_the_same_buffers(load):
    """And what was captured in them; nothing of the last answer is seen."""
    model = load()
    alone = [load().answer(Clip(total), QUESTION, frames=9, **ASK).token_ids for total in (20, 9)]
    first = model.answer(Clip(20), QUESTION, frames=9, **ASK)
    spare = model.pipeline.sessions.spare
    second = model.answer(Clip(9), QUESTION, frames=9, **ASK)
    assert [first.token_ids, second.token_ids] == alone and model.pipeline.sessions.spare is spare
    session = model.open(Clip(20), frames=9)
    session.ask(QUESTION, max_new_tokens=spare.capacity)
    assert model.pipeline.sessions.spare is None and session._cache is not spare
    session.close()
    assert model.pipeline.sessions.spare is None


# --- faults


def test_an_interrupted_answer_leaves_the_session_as_it_was(model):
    session = model.open(Clip(), frames=9)
    expected = session.ask(QUESTION, **ASK)
    turns = list(session.turns)

    def interrupt(_):
        raise KeyboardInterrupt

    for follow_up in (False, True):
        with pytest.raises(KeyboardInterrupt):
            session.ask(QUESTIONS[1], on_token=interrupt, follow_up=follow_up, **ASK)
        assert session.turns == turns
    assert session.ask(QUESTION, **ASK).token_ids == expected.token_ids


HOST_MESSAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
DEVICE_MESSAGE = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 3 GiB"


@pytest.mark.parametrize(
    "stage, owner, name, help_",
    [
        ("vision", "tower", "run", "lower frames"),
        ("projector", "encoder", "project", "projector='commuted'"),
        ("aggregate", "module", "slowfast_aggregate", "smaller layout"),
        ("prefill", "language", "prefill", "close other sessions"),
        ("prefill", "language", "extend", "fewer frames"),
        ("generate", "language", "tokens", "lower max_new_tokens"),
    ],
)
@pytest.mark.parametrize(
    "error, size", [(RuntimeError(HOST_MESSAGE), "4096 bytes"), (torch.OutOfMemoryError(DEVICE_MESSAGE), "2.50 GiB")]
)
def test_out_of_memory_names_the_stage_the_bytes_and_the_setting(
    load, monkeypatch, stage, owner, name, help_, error, size
):
    model = load()
    session = model.open(Clip(), frames=9)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        encoder = model.pipeline.encoder
        owners = {"encoder": encoder, "tower": encoder.tower, "module": video_encoder}
        patch.setattr((owners | {"language": model.pipeline.language})[owner], name, fail)
        with pytest.raises(OutOfMemoryError) as caught:
            session.ask(QUESTION, **ASK)
    message = str(caught.value)
    assert f"out of memory on cpu in stage {stage} (asked for {size}): " in message and help_ in message
    assert "\n" not in message
    assert session.ask(QUESTION, **ASK).token_ids == model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids


def test_the_tower_goes_on_with_fewer_frames_a_pass(load, monkeypatch, caplog):
    model = load()
    expected = model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids
    plain, passes = model.pipeline.encoder.tower.run, []

    def run(pixels):
        passes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError(DEVICE_MESSAGE)
        return plain(pixels)

    monkeypatch.setattr(model.pipeline.encoder.tower, "run", run)
    assert model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids == expected
    assert passes == [9, 4, *[2] * 4, 1] and model.pipeline.encoder.tower.frames_per_pass == 2
    assert "going on with 2 frames a pass" in caplog.text


@pytest.mark.parametrize(
    "most, passes",
    [(1 << 30, [40]), (30 * 37 * 192 * 4, [28, 12]), (1, [14, 14, 12])],  # 37 * 192 values a frame
)
def test_on_a_cpu_small_towers_take_more_frames_a_pass(load, monkeypatch, most, passes):
    expected = load().answer(Clip(40), QUESTION, frames=40, **ASK).token_ids
    monkeypatch.setattr(tower, "_PASS_BYTES", most)
    model, seen = load(), []
    plain = model.pipeline.encoder.tower.run
    monkeypatch.setattr(model.pipeline.encoder.tower, "run", lambda pixels: seen.append(len(pixels)) or plain(pixels))
    assert model.answer(Clip(40), QUESTION, frames=40, **ASK).token_ids == expected
    assert seen == passes


@pytest.mark.parametrize("free, frames", [(1 << 40, 16), (3 * 4 * 37 * 192 * 4, 3), (100, 1)])
def test_passes_of_the_tower_fit_a_gpus_free_memory(load, monkeypatch, free, frames):
    checkpoint = load().checkpoint
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    facts = {"config": checkpoint.model.config, "dtype": torch.float32, "device": torch.device("cuda")}
    on_gpu = SimpleNamespace(model=SimpleNamespace(**facts), grid=checkpoint.grid)
    assert tower.Tower(on_gpu).frames_per_pass == frames


def test_other_errors_pass_as_they_are(load, monkeypatch):
    model = load()

    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(model.pipeline.encoder.tower, "run", fail)
    with pytest.raises(RuntimeError, match="something else"):
        model.open(Clip(), frames=9).ask(QUESTION)


def test_a_bad_question_costs_nothing(load):
    session = load().open(Unreadable(), frames=9)
    for arguments in ({"question": ""}, {"question": "x", "choices": ["one"]}, {"question": "x", "max_new_tokens": 0}):
        with pytest.raises(InputError):
            session.ask(**arguments)


def test_a_video_that_cannot_be_opened(load):
    with pytest.raises(VideoError):
        load().open("/nowhere.mp4")
    with pytest.raises(InputError, match="frames must be an integer of at least 1, not 0"):
        load().open(Clip(), frames=0)


# --- saved


@pytest.mark.parametrize("released", [False, True])
def test_a_saved_session_goes_on(model, tmp_path, released, monkeypatch):
    session = model.open(Clip(), frames=9)
    first = session.ask(QUESTION, **ASK)
    if released:
        session.release()
    path = session.save(tmp_path / "clip.session")
    expected = session.ask(QUESTIONS[1], follow_up=True, **ASK)
    encoded = count_calls(monkeypatch, model.pipeline.encoder, "write_video")
    prefilled = count_calls(monkeypatch, model.pipeline.language, "prefill")
    loaded = model.load_session(path)
    assert loaded.turns == [Turn(QUESTION, first.text)] and loaded.frames == session.frames
    again = loaded.ask(QUESTIONS[1], follow_up=True, **ASK)
    assert again.token_ids == expected.token_ids and again.video == expected.video
    assert not encoded and len(prefilled) == int(released)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.session"]


def test_a_session_belongs_to_its_model(load, tmp_path):
    model = load()
    session = model.open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    path = session.save(tmp_path / "clip.session")
    others = [load("mistral"), load(options={"dtype": "bf16"}), load(seed=1), load(options={"projector": "commuted"})]
    for other in others:
        with pytest.raises(InputError, match="was saved with another model, prompt, dtype, layout or reduction"):
            other.load_session(path)
    model = model.with_layout(model.layout.only("fast"))
    with pytest.raises(InputError, match="another model, prompt, dtype, layout or reduction"):
        model.load_session(path)


def test_a_checkpoint_that_was_moved_is_the_same_model(load, checkpoints, tmp_path):
    session = load().open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    session.save(tmp_path / "clip.session")
    moved = shutil.copytree(checkpoints(), tmp_path / "moved")
    SlowFastLlava.from_pretrained(moved, LAYOUT).load_session(tmp_path / "clip.session")


def test_files_that_are_no_session(load, tmp_path):
    model = load()
    (tmp_path / "text").write_text("no session")
    (tmp_path / "empty").touch()
    for name in ("text", "empty", "missing", "."):
        with pytest.raises(InputError, match="is not a readable session"):
            model.load_session(tmp_path / name)
    with pytest.raises(InputError, match="is not a session of this version"):
        model.load_session(model_dir() / "model.safetensors")


def test_a_session_that_cannot_be_written(load, tmp_path):
    session = load().open(Clip(), frames=9)
    with pytest.raises(InputError, match="holds nothing yet: ask a question first"):
        session.save(tmp_path / "x")
    session.ask(QUESTION, **ASK)
    with pytest.raises(InputError, match="cannot write the session to"):
        session.save(tmp_path / "no" / "folder" / "x")
    assert not list(tmp_path.iterdir())


# --- batches


def test_a_batch_answers_as_each_alone(model):
    short, long = Clip(7), Clip(20)
    asked = [(short, QUESTIONS[0]), (long, QUESTIONS[1]), (short, QUESTIONS[2]), (long, QUESTION, ["left", "right"])]
    answers = model.answer_batch(asked, frames=9, max_new_tokens=16)
    for answer, (clip, question, *choices) in zip(answers, asked):
        alone = model.answer(clip, question, frames=9, max_new_tokens=16, choices=choices[0] if choices else None)
        assert answer.token_ids == alone.token_ids
        assert (answer.question, answer.option, answer.frames) == (alone.question, alone.option, alone.frames)
    assert len({tuple(answer.token_ids) for answer in answers}) > 2


def test_a_batch_of_one_question(model):
    (answer,) = model.answer_batch([(Clip(), QUESTION)], frames=9, **ASK)
    assert answer.token_ids == model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids
    assert len(set(answer.token_ids)) > 1


def test_a_batch_runs_the_language_model_once_a_step(load, monkeypatch):
    model = load()
    encoded = count_calls(monkeypatch, model.pipeline.encoder, "write_video")
    passes = count_calls(monkeypatch, model.pipeline.language, "_run")
    clips = [Clip(7), Clip(20)]
    answers = model.answer_batch([(clips[i % 2], q) for i, q in enumerate(QUESTIONS)], frames=9, max_new_tokens=5)
    assert len(encoded) == 2
    assert len(passes) == 1 + 1 + max(len(answer.token_ids) for answer in answers) - 1  # videos, questions, tokens
    assert not list(model.pipeline.sessions)


def test_rows_that_stop_early_wait_for_the_others(load):
    model = load()
    answers = [model.answer(Clip(), question, frames=9, max_new_tokens=12).token_ids for question in QUESTIONS]
    model.pipeline.prompts.stop_ids = frozenset({answers[0][4], answers[1][7]})
    alone = [model.answer(Clip(), question, frames=9, max_new_tokens=12).token_ids for question in QUESTIONS]
    assert len({len(ids) for ids in alone}) > 1
    together = model.answer_batch([(Clip(), question) for question in QUESTIONS], frames=9, max_new_tokens=12)
    assert [answer.token_ids for answer in together] == alone


def test_rows_whose_positions_are_rescaled_are_answered_alone(load, monkeypatch):
    model = load(text={"max_position_embeddings": 4096})
    model = model.with_layout("slowfast-slow_56frms_concat-fast_6x6")
    asked = [(Clip(56), QUESTION * 30), (Clip(9), QUESTION)]
    extended = count_calls(monkeypatch, model.pipeline.language, "extend_rows")
    together = model.answer_batch(asked, frames=56, max_new_tokens=4)
    ((_, parts, _),) = extended
    assert len(parts) == 1  # the other row's tokens would be the same here, its logits would not
    alone = [model.answer(clip, question, frames=56, max_new_tokens=4) for clip, question in asked]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


@pytest.mark.parametrize(
    "entry, match",
    [
        ((Unreadable(),), r"entry 1 of the batch must be \(video, question\)"),
        ("clip.mp4", r"entry 1 of the batch must be"),
        ((Unreadable(), ""), "the question is empty"),
        ((Unreadable(), "x", ["one"]), "choices must be"),
    ],
)
def test_a_bad_entry_is_found_before_any_work(load, entry, match):
    with pytest.raises(InputError, match=match):
        load().answer_batch([(Unreadable(), QUESTION), entry], frames=9)


def test_an_empty_batch(load):
    assert load().answer_batch([]) == []


def test_projector_modes(load):
    exact, commuted = load(), load(options={"projector": "commuted"})
    ids = [model.answer(Clip(), QUESTION, frames=9, **ASK) for model in (exact, commuted)]
    assert ids[0].token_ids == ids[1].token_ids  # float32: the difference is far below what moves a token
    assert [answer.projector for answer in ids] == ["exact", "commuted"] and all(
        "aggregate" in answer.seconds for answer in ids
    )
    with pytest.raises(InputError, match="unknown projector mode 'fast'"):
        load(options={"projector": "fast"})


def test_a_projector_that_cannot_be_commuted(load):
    relu = {"projector_hidden_act": "relu"}
    with pytest.raises(InputError, match="cannot be commuted with pooling: its activation ReLU.* take exact or auto"):
        load(options={"projector": "commuted"}, **relu)
    answers = [
        load(options={"projector": mode}, **relu).answer(Clip(), QUESTION, frames=9, **ASK)
        for mode in ("exact", "auto")
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_the_embedded_model_answers_alike_in_every_way():
    from sfllava_fast import embedded

    model = SlowFastLlava.from_pretrained()
    clip, questions = embedded.sample_video(), embedded.sample_questions()
    session = model.open(clip)
    told = [session.ask(question).text for question in questions]
    assert told == [answer.text for answer in model.answer_batch([(clip, question) for question in questions])]
    assert told[0] == model.answer(clip, questions[0]).text
    assert str(model.layout) != LAYOUT
