"""The model that lmms-eval gets: against the engine asked directly, and with lmms-eval's own command where it is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import lmms_stand_in
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_engine import LAYOUT

from sfllava_fast.embedded.scenes import write_video
from sfllava_fast.embedded.training.evaluate import draw_exam
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import BackendError, ContextError, InputError, VideoError
from sfllava_fast.model.prompts import TEMPLATES

HAS_LMMS = importlib.util.find_spec("lmms_eval") is not None
LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
CHOICES = ["a cat", "a dog", "nothing"]
MULTIPLE_CHOICE = "\n".join(["what is it", *(f"{c}. {text}" for c, text in zip("ABC", CHOICES)), LETTER])


@pytest.fixture
def serving(monkeypatch):
    """Our module, over lmms-eval or what stands in for it."""
    if not HAS_LMMS:
        lmms_stand_in.install(monkeypatch)
    yield importlib.import_module("sfllava_fast.serving.lmms_eval")
    if not HAS_LMMS:
        for name in ("lmms_eval", "lmms_eval_manifest"):
            sys.modules.pop(f"sfllava_fast.serving.{name}", None)


@pytest.fixture
def make(serving, checkpoints):
    """The model of lmms-eval, of a tiny checkpoint, with nothing in its task dictionary yet."""

    def make(**arguments):
        pretrained = arguments.pop("pretrained", None) or str(checkpoints())
        settings = {"frames": 8, "max_new_tokens": 6, "layout": LAYOUT, "device": "cpu"} | arguments
        return serving.SfllavaFast(pretrained=pretrained, **settings)

    return make


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three folders of frames of noise: of any brightness, dark, bright."""
    folders, noise = [], np.random.default_rng(0)
    for low, high in ((0, 256), (0, 60), (200, 256)):
        folder = tmp_path_factory.mktemp("video")
        for number in range(10):
            Image.fromarray(noise.integers(low, high, (24, 32, 3), np.uint8)).save(folder / f"{number}.png")
        folders.append(str(folder))
    return folders


def requests(lm, rows, task="drawn", settings=None):
    """A request for each (video, text), as lmms-eval makes them for a simple model."""
    from lmms_eval.api.instance import Instance

    lm.task_dict[task] = {"test": [{"visuals": visual if isinstance(visual, list) else [visual]} for visual, _ in rows]}
    return [
        Instance(
            "generate_until",
            (text, dict(settings or {"max_new_tokens": 6}), lambda doc: doc["visuals"], number, task, "test"),
            0,
            {"task": task, "doc_id": number, "repeats": 1},
        )
        for number, (_, text) in enumerate(rows)
    ]


def texts(results):
    return [result.text for result in results]


def record(monkeypatch, model, name):
    """Calls of a method of the model, which goes on as it was."""
    calls, method = [], getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args: calls.append(args) or method(*args))
    return calls


def test_answers_are_those_of_the_engine_in_the_order_of_the_requests(make, checkpoints, videos, monkeypatch):
    lm = make()
    asked = zip((0, 1, 2, 1, 2, 0), ("Why?", "Why?", "Why?", "How many?", "How many?", "a"))
    rows = [(videos[number], text) for number, text in asked]
    sessions, open_ = [], lm.model.open
    monkeypatch.setattr(lm.model, "open", lambda *args: sessions.append(open_(*args)) or sessions[-1])
    results = lm.generate_until(requests(lm, rows))
    direct = SlowFastLlava.from_pretrained(checkpoints(), LAYOUT, device="cpu")
    answers = [direct.answer(video, text, frames=8, max_new_tokens=6) for video, text in rows]
    assert texts(results) == [answer.text for answer in answers] and len(set(texts(results))) == len(rows)
    assert [session.video for session in sessions] == videos, "a video is opened once"
    assert all(session.closed for session in sessions)
    for result, answer in zip(results, answers):
        assert result.token_counts.output_tokens == len(answer.token_ids)
        assert result.token_counts.input_tokens == answer.prompt_tokens + answer.tokens["total"]


def test_frames_in_memory_are_a_video(make, videos):
    lm = make()
    frames = np.stack([np.asarray(Image.open(f"{videos[0]}/{number}.png")) for number in range(10)])
    rows = [(videos[0], "What is it?"), (frames, "What is it?"), (torch.tensor(frames), "What is it?")]
    (first, *others) = texts(lm.generate_until(requests(lm, rows)))
    assert first and others == [first, first]


def test_published_options_are_asked_in_the_paper_s_prompt_and_answered_by_a_letter(make, videos, monkeypatch, caplog):
    lm = make()
    prompts = record(monkeypatch, lm.model.pipeline.prompts, "prompt")
    replies = iter(["B) a dog", "a dog", "A horse, maybe", "neither"])
    monkeypatch.setattr(lm.model.pipeline.prompts, "text", lambda *_: next(replies))
    # The published rule knows no repeated choice: "a dog" begins with an A.
    assert texts(lm.generate_until(requests(lm, [(videos[0], MULTIPLE_CHOICE)] * 4))) == ["B", "A", "A", "neither"]
    assert prompts == [("what is it", CHOICES, ())] * 4
    (told,) = caplog.messages
    assert told == f"drawn: asked multiple choice as published, without {LETTER!r}".replace("'Answer", '"Answer')


def test_options_are_read_by_our_rule_on_request(make, videos, monkeypatch):
    lm = make(option_rule="own")
    replies = iter(["B) a dog", "a dog", "neither"])
    monkeypatch.setattr(lm.model.pipeline.prompts, "text", lambda *_: next(replies))
    assert texts(lm.generate_until(requests(lm, [(videos[0], MULTIPLE_CHOICE)] * 3))) == ["B", "B", "neither"]
    with pytest.raises(InputError, match="unknown option_rule 'mine': choose one of published, own"):
        make(option_rule="mine")


def test_published_open_questions_lose_the_task_s_instruction(make, videos, monkeypatch):
    lm = make()
    prompts = record(monkeypatch, lm.model.pipeline.prompts, "prompt")
    lm.generate_until(requests(lm, [(videos[0], f"Is it red? {PHRASE}")]))
    assert prompts == [("Is it red?", None, ())]
    text = lm.model.pipeline.prompts.prompt("Is it red?").text
    assert text == TEMPLATES["vicuna"].open_ended.format(question="Is it red?")


@pytest.mark.parametrize("prompt", ["auto", "vicuna"])
def test_the_task_protocol_asks_its_whole_text(make, videos, monkeypatch, prompt):
    lm = make(protocol="task", prompt=prompt)
    prompts = record(monkeypatch, lm.model.pipeline.prompts, "prompt")
    lm.generate_until(requests(lm, [(videos[0], MULTIPLE_CHOICE)]))
    assert prompts == [(MULTIPLE_CHOICE, None, ())]
    frame = "USER: <image>\n{question} ASSISTANT:" if prompt == "auto" else TEMPLATES["vicuna"].open_ended
    assert lm.model.pipeline.prompts.prompt(MULTIPLE_CHOICE).text == frame.format(question=MULTIPLE_CHOICE)


def test_the_longest_answer_is_the_argument_s_the_task_s_or_the_checkpoint_s(make, videos):
    def longest(settings, **arguments):
        lm = make(**arguments)
        (result,) = lm.generate_until(requests(lm, [(videos[0], "What is it?")], settings=settings))
        return result.token_counts.output_tokens

    assert longest({"max_new_tokens": 3}) == 6
    assert longest({"max_new_tokens": 3}, max_new_tokens=None) == 3
    assert longest({"until": None}, max_new_tokens=None) > 6


def test_until_ends_an_answer(make, videos, monkeypatch):
    lm = make()
    monkeypatch.setattr(lm.model.pipeline.prompts, "text", lambda *_: "a red circle\n\nand more")
    rows = [(videos[0], "What is it?")]
    for until, text in [(["\n\n"], "a red circle"), ("circle", "a red "), (["", "x"], "a red circle\n\nand more")]:
        assert texts(lm.generate_until(requests(lm, rows, settings={"until": until}))) == [text]


def test_settings_that_answers_do_not_keep_to_are_said_once(make, videos, caplog):
    lm = make()
    kept = {"temperature": 0.0, "do_sample": False, "num_beams": 1, "top_p": 0.9, "until": ["x"]}
    for settings in (kept, kept | {"num_beams": 5, "best_of": 2}):
        lm.generate_until(requests(lm, [(videos[0], "What is it?")] * 2, settings=settings))
    ignored = "drawn: answers are greedy, ignored are {'num_beams': 5, 'best_of': 2}"
    assert caplog.messages == ["drawn: asked open-ended as published", ignored]
    make(batch_size="8")
    assert "batch_size=8 is ignored" in caplog.text


def test_a_video_that_cannot_be_read_costs_only_its_own_answers(make, videos, caplog):
    caplog.set_level(logging.ERROR)
    lm = make()
    rows = [(videos[0], "What is it?"), ("no/such.mp4", "What is it?"), (videos[1], "What is it?")]
    first, none, last = lm.generate_until(requests(lm, rows))
    assert none.text == "" and none.token_counts is None and first.text and last.text
    assert caplog.messages == [
        "drawn: a question has no answer: no/such.mp4 does not exist: check the path of the video",
        "1 of 3 questions have no answer and count as wrong",
    ]


def test_a_question_that_does_not_fit_costs_only_its_own_answer(make, videos, caplog):
    lm = make()
    rows = [(videos[0], "What is it?" * 300), (videos[0], "What is it?")]
    none, answer = texts(lm.generate_until(requests(lm, rows)))
    assert none == "" and answer and "exceed the context of 2048" in caplog.text


def test_an_unexpected_exception_costs_only_its_own_answer(make, videos, caplog, monkeypatch):
    lm = make()
    method, raised = lm.model.pipeline.prompts.prompt, {"odd": TypeError("a bug"), "worse": RuntimeError("CUDA error")}

    def prompt(question, *more):
        if question in raised:
            raise raised[question]
        return method(question, *more)

    monkeypatch.setattr(lm.model.pipeline.prompts, "prompt", prompt)
    rows = [(videos[0], "odd"), (videos[0], "half \ud83d"), (videos[0], "What is it?")]
    odd, half, answer = texts(lm.generate_until(requests(lm, rows)))
    assert (odd, half) == ("", "") and answer and "drawn: a question has no answer: TypeError: a bug" in caplog.messages
    with pytest.raises(RuntimeError, match="CUDA error"):
        lm.generate_until(requests(lm, [(videos[0], "worse"), *rows]))


def test_where_nothing_is_answered_the_first_error_is_raised(make, videos):
    lm = make()
    with pytest.raises(VideoError, match="no/such.mp4"):
        lm.generate_until(requests(lm, [("no/such.mp4", "What is it?"), (videos[0], "What is it?" * 300)]))
    with pytest.raises(ContextError, match="lower frames"):
        lm.generate_until(requests(lm, [(videos[0], "What is it?" * 300)]))
    assert lm.generate_until([]) == []


def test_a_process_among_others_does_not_raise_for_they_would_wait(make):
    lm = make()
    lm._world_size = 2
    assert texts(lm.generate_until(requests(lm, [("no/such.mp4", "What is it?")]))) == [""]


@pytest.mark.parametrize(
    "visuals, shown",
    [
        ([Image.new("RGB", (8, 8))], "Image"),
        (["picture.PNG"], "an image"),
        ([{"array": [0.0], "sampling_rate": 16000}], "dict"),
        (["a.mp4", "b.mp4"], "str, str"),
        ([Image.new("RGB", (8, 8))] * 9, "Image, Image, Image, ..."),
        ([], "nothing"),
    ],
)
def test_a_task_of_anything_but_videos_is_refused_by_name_before_any_answer(make, videos, monkeypatch, visuals, shown):
    lm = make()
    opened = record(monkeypatch, lm.model, "open")
    with pytest.raises(InputError) as caught:
        lm.generate_until(requests(lm, [(videos[0], "What is it?"), (visuals, "What is it?")], task="mme"))
    assert f"the task mme shows {shown}, and" in str(caught.value) and not opened


def test_what_the_model_cannot_do_is_said_with_the_task(make, videos):
    lm = make()
    for method in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="the task egoschema_mcppl asks .*: take"):
            method(requests(lm, [(videos[0], "What is it?")], task="egoschema_mcppl"))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"pretained": "x"}, InputError, "unknown model argument pretained: there are pretrained, protocol, option_"),
        ({"protocol": "paper"}, InputError, "unknown protocol 'paper': choose one of published, task"),
        ({"frames": "fifty"}, InputError, "frames must be an integer"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens must be an integer"),
        ({"decoder": "vlc"}, BackendError, "unknown decoder 'vlc'"),
        ({"dtype": "auto"}, InputError, "unknown dtype 'auto'"),
        ({"projector": "fast"}, InputError, "unknown projector mode 'fast'"),
        ({"prompt": "qwen"}, InputError, "unknown prompt 'qwen'"),
    ],
)
def test_wrong_arguments_are_one_line(make, arguments, error, message):
    with pytest.raises(error) as caught:
        make(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_model_must_be_named(serving):
    with pytest.raises(InputError, match="name the model: pretrained=DIR_OR_HUB_ID, or embedded"):
        serving.SfllavaFast()


def test_each_process_has_its_own_gpu(serving, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    devices = ("cuda", None, "cuda:0", "cpu")
    assert [serving._own_device(device) for device in devices] == list(devices)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [serving._own_device(device) for device in devices] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert serving._own_device(None) is None


def test_the_memory_is_given_back_for_a_judge(make):
    lm = make()
    assert lm.device == torch.device("cpu")
    lm.clean()
    assert not hasattr(lm, "model")


def test_the_manifest_names_the_class(serving):
    manifest = importlib.import_module("sfllava_fast.serving.lmms_eval_manifest").manifest()
    assert manifest.model_id == "sfllava_fast" and manifest.chat_class_path is None
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is serving.SfllavaFast and serving.SfllavaFast.is_simple


@pytest.mark.skipif(not HAS_LMMS, reason="needs lmms-eval: make test-lmms")
@pytest.mark.parametrize("first", ["lmms_eval.models", "sfllava_fast.serving.lmms_eval"])
def test_lmms_eval_finds_it_by_the_entry_point_whatever_is_imported_first(first):
    code = f"import {first}, lmms_eval.models as models; print(models.get_model('sfllava_fast'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "<class 'sfllava_fast.serving.lmms_eval.SfllavaFast'>\n", run.stdout + run.stderr


def write_task(folder: Path, clips: int) -> list[dict[str, str]]:
    """A task of questions about drawn clips, in a mixed order, as lmms-eval reads it from a folder."""
    documents = []
    for number, (scene, total, questions) in enumerate(draw_exam(clips, seed=7)):
        clip = folder / f"clip{number}.mp4"
        write_video(scene, clip, total)
        documents += [{"video": str(clip), "question": q.text, "answer": q.answer} for q in questions]
    random.Random(0).shuffle(documents)
    (folder / "drawn.json").write_text("\n".join(map(json.dumps, documents)))
    (folder / "utils.py").write_text("def doc_to_visual(doc):\n    return [doc['video']]\n")
    (folder / "drawn.yaml").write_text(
        f"""task: drawn
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "drawn.json"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return documents


@pytest.mark.skipif(not HAS_LMMS, reason="needs lmms-eval: make test-lmms")
def test_lmms_eval_s_command_scores_a_local_task_as_asking_directly_does(tmp_path, monkeypatch):
    documents = write_task(tmp_path, clips=2)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = f"""{sys.executable} -m lmms_eval --model sfllava_fast --model_args pretrained=embedded,device=cpu
        --tasks drawn --include_path {tmp_path} --output_path {tmp_path}/out --log_samples"""
    run = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (samples,) = tmp_path.glob("out/*/*_samples_drawn.jsonl")
    (results,) = tmp_path.glob("out/*/*_results.json")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    model = SlowFastLlava.from_pretrained(device="cpu")
    answers = [model.answer(one["video"], one["question"], max_new_tokens=8).text for one in documents]
    assert [sample["filtered_resps"] for sample in told] == answers and len(set(answers)) > 5
    right = [answer == one["answer"] for answer, one in zip(answers, documents)]
    score = json.loads(results.read_text())["results"]["drawn"]["exact_match,none"]
    assert score == pytest.approx(sum(right) / len(right)) and 0.5 < score < 1
