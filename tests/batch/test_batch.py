"""Batches in real worker processes: questions that fail, kill or hang, and what a kill of the batch leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from functools import partial
from multiprocessing import connection as connections
from pathlib import Path
from types import SimpleNamespace

import clips
import pytest
from batch_answerers import asked, make_nothing, make_obedient
from tiny_engine import LAYOUT

from sfllava_fast.batch import scheduler
from sfllava_fast.batch.questions import Question, by_video
from sfllava_fast.batch.run import run
from sfllava_fast.batch.workers import AnswererHost, Reply
from sfllava_fast.cli import main as cli
from sfllava_fast.errors import BackendError, CheckpointError, InputError, VideoError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "asked"


@pytest.fixture
def answer(out, log):
    """Runs a batch of (id, video, question) in obedient workers; what `run` gives."""

    def answer(rows, **options):
        groups = by_video(Question(key, video, text) for key, video, text in rows)
        return run(groups, out, {}, partial(make_obedient, log=log), **options)

    return answer


def read(path):
    """The output by id; each of them once."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert max(Counter(line["id"] for line in lines).values(), default=1) == 1
    return {line["id"]: line for line in lines}


def rows(*questions, video="v"):
    return [(f"{video}{i}", video, question) for i, question in enumerate(questions)]


def test_a_videos_questions_go_to_one_worker_in_order(answer, out, log):
    many = [row for name in "abcdef" for row in rows(*["wait 0.05"] * 4, video=name)]
    shuffled = [many[i * 7 % len(many)] for i in range(len(many))]
    table, complete = answer(shuffled, workers=2)
    assert complete and "answered    24" in table and "questions   24 about 6 videos" in table
    lines = read(out)
    assert {key: line["answer"] for key, line in lines.items()} == {key: f"{text}!" for key, _, text in many}
    assert all(line["attempts"] == 1 and 0.05 <= line["seconds"] < 60 for line in lines.values())
    told = asked(log)
    processes = {name: {process for key, process in told if key.startswith(name)} for name in "abcdef"}
    assert all(len(of_video) == 1 for of_video in processes.values()) and len(set.union(*processes.values())) == 2
    for process in set.union(*processes.values()):
        order = [key for key, of in told if of == process]
        wanted = [key for key, *_ in shuffled]
        videos = list(dict.fromkeys(key[0] for key in order))
        assert order == [key for name in videos for key in wanted if key[0] == name]


def test_a_question_that_fails_is_asked_again_behind_the_others(answer, out, log, tmp_path):
    table, complete = answer([*rows("ok", f"once {tmp_path / 'was'}", "ok"), *rows("ok", video="w")])
    assert complete and [key for key, _ in asked(log)] == ["v0", "v1", "w0", "v1", "v2"]
    assert [line["attempts"] for line in read(out).values()] == [1, 1, 2, 1]
    assert len({process for _, process in asked(log)}) == 1  # nothing was wrong with the worker


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("die SIGKILL", "the worker was killed by SIGKILL (out of memory?)"),
        ("die SIGSEGV", "the worker was killed by SIGSEGV"),
        ("fail", "a bad video"),
        ("fill", "out of memory"),
    ],
)
def test_a_video_that_keeps_failing_is_quarantined_alone(word, error, answer, out, log):
    table, complete = answer([*rows(word, "ok", "ok"), *rows("ok", "ok", video="w")], attempts=2)
    assert not complete
    lines = read(out)
    assert [lines[key]["ok"] for key in ("v0", "v1", "v2", "w0", "w1")] == [False, False, False, True, True]
    assert lines["v0"]["error"] == error and lines["v0"]["attempts"] == 2 and lines["v0"]["quarantined"]
    assert lines["v2"]["error"] == f"v is quarantined: {error}" and lines["v2"]["attempts"] == 0
    assert f"quarantined v (3 questions): {error}" in table and "quarantined w" not in table
    assert Counter(key for key, _ in asked(log)) == {"v0": 2, "w0": 1, "w1": 1}
    processes = dict.fromkeys(process for _, process in asked(log))
    # None is made for the last failure: nothing is left to ask.
    assert len(processes) == (1 if word in ("fail", "fill") else 2)


def test_a_question_that_kills_does_not_take_its_answered_video_along(answer, out):
    answer(rows("ok", "die SIGKILL", "ok"), attempts=2)
    lines = read(out)
    assert [lines[key]["ok"] for key in ("v0", "v1", "v2")] == [True, False, True]


def test_a_wrong_question_is_asked_once(answer, out, log):
    table, complete = answer(rows("refuse", "ok"))
    assert not complete and "error       v: a wrong question" in table
    assert read(out)["v0"]["attempts"] == 1 and read(out)["v1"]["ok"]
    assert [key for key, _ in asked(log)] == ["v0", "v1"]


@pytest.mark.parametrize(("word", "times", "processes"), [("bug ZeroDivisionError", 1, 1), ("bug RuntimeError", 2, 3)])
def test_an_unexpected_exception_is_the_questions_own(word, times, processes, answer, out, log):
    table, complete = answer([*rows(word, "ok", word, "ok"), *rows("ok", video="w")], attempts=2)
    assert not complete and "quarantined" not in table
    lines = read(out)
    assert [lines[key]["ok"] for key in ("v0", "v1", "v2", "v3", "w0")] == [False, True, False, True, True]
    assert lines["v0"]["error"] == f"{word.split()[1]}: a bug" and lines["v0"]["attempts"] == times
    assert Counter(key for key, _ in asked(log)) == {"v0": times, "v1": 1, "v2": times, "v3": 1, "w0": 1}
    # Only one that may stay with the process ends it.
    assert len({process for _, process in asked(log)}) >= processes


def test_a_question_that_hangs_is_ended(answer, out, log):
    answer([*rows("hang"), *rows("ok", video="w")], attempts=2, timeout=1.0)
    lines = read(out)
    assert lines["v0"]["error"] == "no answer within 1 seconds" and lines["v0"]["attempts"] == 2
    assert lines["v0"]["seconds"] == 1.0 and lines["w0"]["ok"]
    for _, process in asked(log):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_worker_that_dies_idle_is_missed_by_no_question(answer, out, log):
    _, complete = answer([*rows("wait 1", "murder", "wait 0.2", "ok"), *rows("ok", video="w")], workers=2)
    assert complete and len(read(out)) == 5 and len({process for _, process in asked(log)}) == 2


def test_errors_are_kept_until_they_are_asked_again(answer, out, log, tmp_path):
    questions = [*rows(f"once {tmp_path / 'was'}", "ok"), *rows("ok", video="w")]
    answer(questions, attempts=1)
    assert not read(out)["v0"]["ok"] and not read(out)["v1"]["ok"]
    before, times = out.read_bytes(), len(asked(log))
    table, complete = answer(questions, attempts=1)
    assert not complete and out.read_bytes() == before and len(asked(log)) == times
    assert "quarantined v (2 questions): a bad video" in table
    table, complete = answer(questions, attempts=1, retry_errors=True)
    assert complete and all(line["ok"] for line in read(out).values()) and len(asked(log)) == times + 2


@pytest.fixture
def revise(out, log):
    """Asks one question of these fields, or another one under its id; True where it was answered."""

    def revise(options, /, **fields):
        question = Question("v0", **({"video": "v", "question": "ok"} | fields))
        groups = by_video([question, Question("v1", "v", "ok again")])
        return run(groups, out, {}, partial(make_obedient, log=log), **options)[1]

    return revise


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "changed", "named"),
    [
        ({}, {"question": "ok?"}, "question"),
        ({}, {"video": "w"}, "video"),
        ({"choices": ["a", "b"]}, {"choices": ["b", "a"]}, "choices"),
        ({"choices": ["a", "b"]}, {}, "choices"),
        ({"extra": {"truth": "a"}}, {"extra": {"truth": "b"}}, "truth"),
        ({}, {"extra": {"truth": "b", "type": NAN}}, "truth, type"),
        ({"extra": {"truth": [1], "type": NAN}}, {"extra": {"truth": [True], "type": NAN}}, "truth"),
    ],
)
def test_another_question_under_an_answered_id_is_refused_or_replaces_it(fields, changed, named, revise, out, log):
    assert revise({}, **fields) and revise({}, **fields) and len(asked(log)) == 2, "the same is not asked again"
    before = out.read_bytes()
    with pytest.raises(InputError, match=rf"under the ids 'v0' \(another {named}\): name another file, or replace"):
        revise({}, **changed)
    assert out.read_bytes() == before and len(asked(log)) == 2
    assert revise({"retry_changed": True}, **changed)
    assert [key for key, _ in asked(log)] == ["v0", "v1", "v0"] and set(read(out)) == {"v0", "v1"}
    for name, value in Question("v0", **({"video": "v", "question": "ok"} | changed)).to_json().items():
        assert json.dumps(read(out)["v0"][name]) == json.dumps(value)
    assert revise({}, **changed) and len(asked(log)) == 3


def test_an_error_is_no_answer_that_another_question_could_lose(revise, out, log):
    assert not revise({}, question="refuse") and not revise({}, question="refuse") and len(asked(log)) == 2
    assert revise({}, question="ok") and read(out)["v0"]["ok"] and len(asked(log)) == 3


def test_no_more_changed_ids_are_named_than_one_can_read(answer):
    answer(rows(*["ok"] * 5))
    with pytest.raises(InputError, match=r"'v0' .*'v1' .*'v2' \(another question\) and 2 more: name"):
        answer(rows(*["ok?"] * 5))


def test_other_question_files_keep_their_answers(answer, out):
    answer(rows("ok", "ok"))
    table, complete = answer(rows("ok", video="w"))
    assert complete and "others      2 of other question files, kept" in table and set(read(out)) == {"v0", "v1", "w0"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_loaded_is_one_line_and_writes_nothing(workers, out):
    groups = by_video([Question(i, f"{i}", "ok") for i in range(3)])
    for error, message in ((CheckpointError, "there is no model"), (SystemExit, "no model could be loaded: .*code 3")):
        with pytest.raises(BackendError, match=message) as raised:
            run(groups, out, {}, partial(make_nothing, error=error), workers)
        assert "\n" not in str(raised.value) and not list(out.parent.iterdir())


def test_what_nothing_can_answer_ends_the_batch_and_counts_for_no_question(answer, out, log):
    for _ in range(2):
        with pytest.raises(BackendError, match="nothing works here"):
            answer(rows("stop", "ok"), attempts=1)
    assert read(out) == {} and len(asked(log)) == 2


# A batch in a process of its own: argv are the output, the log, and (id, video, question) as JSON.
def test_a_worker_shows_warnings_of_libraries_only_when_asked(monkeypatch, caplog):
    caplog.set_level("WARNING", "sfllava_fast")  # loading sets it in a worker's process: put back behind the test

    def load(*options):
        monkeypatch.setattr(sys, "warnoptions", [*options])
        with warnings.catch_warnings():
            return AnswererHost().load(lambda *_: warnings.warn("old", FutureWarning, stacklevel=2), 0, 1)[0]

    assert load() == Reply.READY
    assert load("error") == Reply.UNUSABLE  # as pytest's filter has it


BATCH = """
import json, signal, sys
from functools import partial
from pathlib import Path
from batch_answerers import make_obedient
from sfllava_fast.errors import SfllavaError
from sfllava_fast.batch.questions import Question, by_video
from sfllava_fast.batch.run import run
from sfllava_fast.batch.workers import STOP_SIGNALS
if __name__ == "__main__":
    for number in STOP_SIGNALS:  # the tests may run under nohup, or in a shell's background, where some are ignored
        signal.signal(number, signal.SIG_DFL)
    questions = [Question(*row) for row in json.loads(sys.argv[3])]
    try:
        run(by_video(questions), Path(sys.argv[1]), {}, partial(make_obedient, log=Path(sys.argv[2])), 2, attempts=2)
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
"""


@pytest.fixture
def start(out, log, tmp_path):
    """Starts BATCH in a process group of its own; all of it is killed behind the test."""
    started = []
    script = tmp_path / "batch.py"
    script.write_text(BATCH)

    def start(questions):
        path = os.pathsep.join(map(str, (Path(cli.__file__).parents[2], Path(clips.__file__).parent)))
        process = subprocess.Popen(
            [sys.executable, str(script), str(out), str(log), json.dumps(questions)],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(what):
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come")


def is_gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


def test_killed_with_its_workers_it_goes_on_and_knows_what_killed(start, answer, out, log):
    questions = [*rows("ok", "hang", "ok"), *rows("ok", "hang", video="w")]
    for times in (1, 2):
        process = start(questions)
        wait_for(lambda: Counter(key for key, _ in asked(log)) >= Counter({"v1": times, "w1": times}))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert set(read(out)) == {"v0", "w0"}
    # Both hanging ones were handed out twice: they are given up without another try, and the rest is answered.
    answer(questions, attempts=2)
    lines = read(out)
    assert len(lines) == 5 and lines["v2"]["ok"] and not lines["v1"]["ok"] and lines["w1"]["attempts"] == 2
    assert "ended while it was asked" in lines["w1"]["error"]
    assert Counter(key for key, _ in asked(log)) == {"v0": 1, "w0": 1, "v1": 2, "w1": 2, "v2": 1}


def test_workers_do_not_outlive_a_batch_that_is_killed(start, log):
    process = start(rows("hang"))
    wait_for(lambda: asked(log))
    process.kill()
    wait_for(lambda: is_gone(asked(log)[0][1]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_it_says_so_and_counts_no_attempt(number, start, out, log):
    for times in (1, 2, 3):
        process = start(rows("ok", "hang"))
        wait_for(lambda: Counter(key for key, _ in asked(log))["v1"] == times)
        os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert told == "interrupted: 1 of 2 questions are done; run the same command to continue\n"
        wait_for(lambda: all(is_gone(worker) for _, worker in asked(log)))
    assert list(read(out)) == ["v0"]


def test_no_wait_is_long(answer, monkeypatch):
    """A signal that comes as a wait begins is handled behind it."""
    waits = []

    def wait(of, timeout):
        waits.append(timeout)
        return connections.wait(of, timeout)

    monkeypatch.setattr(scheduler, "connections", SimpleNamespace(wait=wait))
    answer(rows("ok", "ok"))
    assert waits and all(timeout is not None and timeout <= 1 for timeout in waits)


def test_a_worker_is_ended_by_its_batch_alone(start, out, log):
    process = start(rows("die SIGINT", "die SIGTERM", "die SIGHUP"))
    assert process.wait(60) == 0 and len(read(out)) == 3 and len({worker for _, worker in asked(log)}) == 1


def test_two_batches_do_not_write_one_file(start, answer, log):
    start(rows("hang"))
    wait_for(lambda: asked(log))
    with pytest.raises(InputError, match="is being written by another batch"):
        answer(rows("ok"))


def test_a_full_disk_ends_the_batch_and_it_goes_on(answer, out, monkeypatch):
    from sfllava_fast.batch.journal import Journal

    real = Journal.finish
    monkeypatch.setattr(Journal, "finish", lambda self, line: real(self, line) if line["id"] != "v1" else full(out))

    def full(path):
        raise InputError(f"cannot write {path}")

    with pytest.raises(InputError, match="cannot write"):
        answer(rows("ok", "ok", "ok"))
    assert set(read(out)) == {"v0"}
    monkeypatch.undo()
    assert answer(rows("ok", "ok", "ok"))[1] and len(read(out)) == 3


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two clips, one that is cut short, and one that is a folder of frames."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("videos")
    for name in ("plain.mp4", "mpeg4.avi"):
        clips.make(folder, name)
    (folder / "cut.mp4").write_bytes((folder / "plain.mp4").read_bytes()[:4000])
    (folder / "frames").mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / "frames" / f"{number}.png")
    return folder


def batch(*argv):
    return cli.main(["batch", *map(str, argv)])


def test_from_the_command_line_every_answer_is_the_engines(videos, checkpoints, out, tmp_path, capsys):
    from sfllava_fast.engine.slowfast_llava import SlowFastLlava

    asked_of = ["plain", "mpeg4", "frames", "cut", "plain.mp4", "none"]
    questions = [
        {"question_id": f"{video}_{i}", "video_name": video, "question": question, "answer": "?"}
        | ({"candidates": ["a cat", "a dog"], "answer_number": 1} if i == 1 else {})
        for i, question in enumerate(["What is it?", "Which one is it?", "Who did that?"])
        for video in asked_of
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    options = ["--model", checkpoints(), "--layout", LAYOUT, "--frames", 5, "--max-new-tokens", 8, "--device", "cpu"]
    argv = [path, "--videos", videos, "--out", out, "--workers", 2, *options]
    assert batch(*argv) == 1
    told, err = capsys.readouterr()
    assert told == "" and "errors      6" in err and "quarantined cut (3 questions)" in err and "cut short" in err
    assert "quarantined none (3 questions)" in err and "does not exist" in err
    lines = read(out)
    assert set(lines) == {question["question_id"] for question in questions}
    model = SlowFastLlava.from_pretrained(checkpoints(), LAYOUT, device="cpu")
    texts = set()
    for question in questions:
        line = lines[question["question_id"]]
        assert line["truth"] == "?" and line["question"] == question["question"]
        if question["video_name"] in ("cut", "none"):
            assert not line["ok"] and line["quarantined"]
            continue
        clip = next(videos.glob(f"{question['video_name'].split('.')[0]}*"))
        choices = question.get("candidates")
        said = model.answer(clip, question["question"], 5, max_new_tokens=8, choices=choices)
        assert line["answer"] == said.text and line.get("option") == said.option
        assert (line.get("choices"), line.get("choice")) == (choices, said.choice)
        texts.add(said.text)
    assert len(texts) > 3  # there are three questions: the videos are told apart, too
    before = out.read_bytes()
    assert batch(*argv) == 1 and out.read_bytes() == before
    assert batch(*argv, "--dtype", "bfloat16") == 2
    assert "was begun with dtype None, not bfloat16" in capsys.readouterr().err


def test_an_unexpected_exception_while_it_is_opened_is_the_videos(videos, load, monkeypatch):
    from sfllava_fast.batch.answerers import ModelAnswerer
    from sfllava_fast.engine.slowfast_llava import SlowFastLlava

    answerer = ModelAnswerer(load(), videos, 4)
    monkeypatch.setattr(SlowFastLlava, "open", lambda self, *a, **k: [].pop())
    with pytest.raises(VideoError, match="plain.mp4 cannot be opened .IndexError"):
        answerer(Question(1, "plain", "why?"))


def test_half_a_character_costs_its_question_alone(videos, checkpoints, out, tmp_path):
    path = tmp_path / "q.jsonl"
    asked_of = [{"question": "a \ud83d"}, {"question": "why?"}, {"question": "why?", "choices": ["a", "b \udc00"]}]
    path.write_text("".join(json.dumps({"id": i, "video": "plain"} | row) + "\n" for i, row in enumerate(asked_of)))
    options = ["--model", checkpoints(), "--layout", LAYOUT, "--frames", 5, "--max-new-tokens", 4, "--device", "cpu"]
    assert batch(path, "--videos", videos, "--out", out, *options) == 1
    lines = read(out)
    assert [lines[i]["ok"] for i in range(3)] == [False, True, False] and lines[0]["attempts"] == 1
    assert "half of a surrogate pair" in lines[0]["error"] and "half of a surrogate pair" in lines[2]["error"]


def test_a_video_is_encoded_once(videos, load, monkeypatch):
    from sfllava_fast.batch.answerers import ModelAnswerer
    from sfllava_fast.engine.pipeline import Pipeline

    encoded, real = [], Pipeline.write_video
    monkeypatch.setattr(Pipeline, "write_video", lambda self, clip, *a: (encoded.append(clip), real(self, clip, *a))[1])
    answerer = ModelAnswerer(load(), videos, 4)
    asked_of = [(video, choices) for video in ("plain", "mpeg4") for choices in (None, None, ["x", "y"])]
    said = [answerer(Question(i, video, f"why {i}?", choices)) for i, (video, choices) in enumerate(asked_of)]
    assert len(encoded) == 2 and [set(one) for one in said[:3]] == [{"answer"}] * 2 + [{"answer", "choice", "option"}]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{q}", "--out", "{out}", "--model", "{none}"], "none"),
        (["{none}", "--out", "{out}"], "cannot read"),
        (["{q}", "--out", "{q}/a.jsonl"], "is not a folder"),
        (["{q}", "--out", "{q}"], "is not an answer of a batch"),
        (["{q}", "--out", "{out}", "--layout", "slowest"], "unknown layout"),
        (["{q}", "--out", "{out}", "--upload"], "--upload is for a server"),
        (["{q}", "--out", "{out}", "--upload-any"], "--upload is for a server"),
        (["{q}", "--out", "{out}", "--server", "http://x", "--frames", "3", "--ray"], "--frames, --ray: the server"),
        (["{q}", "--out", "{out}", "--server", "host:8000"], "is not the URL of a server"),
        (["{q}", "--out", "{out}", "--server", "http://127.0.0.1:9/v1"], "cannot be used"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(argv, message, tmp_path, out, capfd):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": 1, "video": "v", "question": "?"}) + "\n")
    before = path.read_bytes()
    assert batch(*(part.format(q=path, out=out, none=tmp_path / "none") for part in argv)) == 2
    told, err = capfd.readouterr()
    assert told == "" and err.startswith("sfllava-fast: error: ") and message in err and len(err.splitlines()) == 1
    assert path.read_bytes() == before and not (out.exists() and out.read_bytes())


@pytest.mark.parametrize("argv", [["q"], ["q", "--out", "a", "--workers", "0"], ["q", "--out", "a", "--timeout", "-1"]])
def test_wrong_usage(argv, capsys):
    assert batch(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("sfllava-fast: error: ") and err.count("\n") == 1 and "`sfllava-fast batch --help`" in err


def test_the_embedded_model_says_what_it_knows_and_picks_choices_by_their_words(tmp_path, capfd):
    from sfllava_fast.embedded import CAVEAT, sample_answers, sample_questions, sample_video
    from sfllava_fast.embedded.scenes import draw_scene, write_video

    write_video(draw_scene("watch/1"), tmp_path / "drawn.mp4")
    (tmp_path / "same.mp4").write_bytes(sample_video().read_bytes())
    question, truth = sample_questions()[1], sample_answers()[1]
    asked = {"question": question, "choices": ["blue", f"{truth.title()}.", truth[0].upper()], "answer_number": 1}
    rows = [{"id": 1, "video": "same.mp4", **asked}, {"id": 2, "video": "drawn.mp4", **asked, "choices": ["x", "y"]}]
    rows += [{"id": 3, "video": "drawn.mp4", "question": "does the video show a orange cross?"}]
    path, out = tmp_path / "q.jsonl", tmp_path / "new" / "folder" / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert batch(path, "--videos", tmp_path, "--out", out) == 0
    lines = read(out)
    assert (lines[1]["answer"], lines[1]["option"]) == (truth, 1) and "caveat" not in lines[1]
    assert lines[2]["option"] is None and lines[2]["choice"] is None and lines[3]["answer"] == "yes"
    assert lines[2]["caveat"] == lines[3]["caveat"] == CAVEAT
    said = f"sfllava-fast: warning: {CAVEAT}"
    assert capfd.readouterr().err.splitlines().count(said) == 1
    path.write_text(json.dumps(rows[0]) + "\n")
    assert batch(path, "--videos", tmp_path, "--out", tmp_path / "b.jsonl") == 0
    assert CAVEAT not in capfd.readouterr().err


def test_cores_and_gpus_are_shared_out(monkeypatch):
    import torch

    from sfllava_fast.batch.answerers import make_model
    from sfllava_fast.engine.slowfast_llava import SlowFastLlava

    loaded, threads = [], []
    monkeypatch.setattr(SlowFastLlava, "from_pretrained", lambda model, **options: loaded.append(options["device"]))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)

    def make(device, count):
        for number in range(count):
            make_model(number, count, None, Path(), device, None, "pyav", None)

    make(None, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    make(None, 3)
    make("cuda:1", 2)
    make("cpu", 1)
    assert loaded == [None] * 3 + ["cuda:0", "cuda:1", "cuda:0"] + ["cuda:1"] * 2 + ["cpu"]
    assert threads == [5] * 6 + [8] * 2 + [16]


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    from sfllava_fast.batch import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress("answered", 10, 100) as told:
        for number in range(20):
            now[0] += 4.0
            told(number != 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "answered: 18 of 100, 1 errors, 0:05:28 left",
        "answered: 26 of 100, 1 errors, 0:04:56 left",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    from sfllava_fast.batch import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.show_progress("answered", 1, 3) as told:
        told(True)
        told(False)
    assert "3/3" in capsys.readouterr().err


def test_the_summary_names_no_more_videos_than_one_can_read(answer, out):
    table, _ = answer([(i, f"v{i}", "refuse") for i in range(25)])
    assert table.count("a wrong question") == 20 and "and 5 more videos" in table


def test_groups_of_a_resumed_batch_hold_what_is_left(answer, out, log):
    answer(rows("ok", "ok"))
    answer(rows("ok", "ok", "ok"))
    assert [key for key, _ in asked(log)] == ["v0", "v1", "v2"]
    assert deque(read(out)) == deque(["v0", "v1", "v2"])
