"""Watching: when answers come and of what, what is printed, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import clips
import pytest
import torch

from sfllava_fast.cli import commands
from sfllava_fast.cli import main as cli
from sfllava_fast.embedded import CAVEAT
from sfllava_fast.engine.watch import time_stamp, watch_live
from sfllava_fast.errors import ContextError

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("deadline")


class Session:
    """Answers with the number of frames pushed, halved so that answers repeat; stands in for a stream's session."""

    def __init__(self, *made):
        self.made, self.frames, self.asked, self.closed = made, [], [], False

    def push(self, frames):
        assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[::3] == (1, 3)
        self.frames.append(frames)

    def ask(self, question, max_new_tokens=None):
        self.asked.append((question, len(self.frames), max_new_tokens))
        fields = dict(question=question, frames=list(range(len(self.frames))), tokens={"total": 7})
        text = f"{question}\n{len(self.frames) // 4}"
        return SimpleNamespace(text=text, question=question, to_json=lambda: {"answer": text, **fields})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


def answered(times, every, questions=("a",), **options):
    """(seconds, question, frames pushed) of each answer."""
    session = Session()
    frames = ((seconds, torch.zeros(2, 2, 3, dtype=torch.uint8)) for seconds in times)
    told = [
        (seconds, answer.question, len(answer.to_json()["frames"]))
        for seconds, answer in watch_live(frames, session, questions, every, **options)
    ]
    assert len(session.frames) == len(times)
    return told


def test_answers_come_behind_the_first_frame_at_or_after_each_moment():
    assert answered([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], 2) == [(2, "a", 5), (4, "a", 9)]


def test_what_came_since_the_last_answer_is_answered_at_the_end():
    assert answered([0, 1, 2, 3], 2) == [(2, "a", 3), (3, "a", 4)]
    assert answered([0], 2) == [(0, "a", 1)]
    assert answered([], 2) == []


def test_moments_without_frames_are_answered_once_by_the_next():
    assert answered([0, 1, 9, 9.5, 11], 2) == [(9, "a", 3), (11, "a", 5)]


def test_a_stream_whose_beginning_was_dropped_is_answered_at_once():
    assert answered([20.5, 21], 2) == [(20.5, "a", 1), (21, "a", 2)]


def test_moments_are_met_in_spite_of_rounding():
    assert [seconds for seconds, *_ in answered([0, 0.1, 0.2, 0.3, 0.4], 0.1)] == [0.1, 0.2, 0.3, 0.4]


def test_every_question_is_asked_each_time():
    assert answered([0, 2], 2, ("a", "b")) == [(2, "a", 2), (2, "b", 2)]


def test_only_answers_that_changed():
    # The stand-in's text changes at 4 frames and at 8.
    times = range(10)
    assert [n for *_, n in answered(times, 1, changed_only=True)] == [2, 4, 8]
    both = answered(times, 1, ("a", "b"), changed_only=True)
    assert both == [(t, q, t + 1) for t in (1, 3, 7) for q in "ab"]


@pytest.mark.parametrize(
    ("seconds", "text", "tenths"),
    [
        (0, "0:00", "0:00.0"),
        (2.04, "0:02", "0:02.0"),
        (59.99, "0:59", "0:59.9"),
        (0.3, "0:00", "0:00.3"),
        (754.5, "12:34", "12:34.5"),
        (3723, "1:02:03", "1:02:03.0"),
        (90000, "25:00:00", "25:00:00.0"),
    ],
)
def test_time_stamps(seconds, text, tenths):
    assert (time_stamp(seconds), time_stamp(seconds, decimals=True)) == (text, tenths)


# --- the command


@pytest.fixture
def clip(tmp_path):
    return clips.make(tmp_path, "plain.mp4")  # 2.4 seconds


@pytest.fixture
def model(monkeypatch):
    """What the next command loads: its options, and the session that it opens."""
    loaded = SimpleNamespace(options=None, session=None)

    def open_stream(*made):
        loaded.session = Session(*made)
        return loaded.session

    def load(path, options):
        loaded.options = {"path": path, **vars(options)}
        return SimpleNamespace(open_stream=open_stream)

    monkeypatch.setattr(commands, "load_model", load)
    return loaded


def run(*argv):
    return cli.main([str(a) for a in argv])


def test_watch_prints_answers_with_the_time_of_the_stream(clip, model, capsys):
    assert run("watch", clip, "what?", "--every", 1, "--rate", 5) == 0
    assert capsys.readouterr() == ("[0:01] what? 1\n[0:02] what? 2\n[0:02] what? 3\n", "")
    assert [frames for _, frames, _ in model.session.asked] == [6, 11, 12]
    assert model.session.made == ("slowfast", None, None, str(clip)) and model.session.closed


def test_the_defaults_of_watch(clip, model, capsys):
    assert run("watch", clip, "what?") == 0
    assert capsys.readouterr().out == "[0:02] what? 1\n"
    assert len(model.session.frames) == 5  # 0, 0.52, 1, 1.52 and 2 seconds


def test_several_questions_and_moments_between_seconds(clip, model, capsys):
    assert run("watch", clip, "what?", "where?", "--every", 1.5) == 0
    lines = "[0:01.5] what? | what? 1", "[0:01.5] where? | where? 1", "[0:02.0] what? | what? 1"
    assert capsys.readouterr().out.splitlines() == [*lines, "[0:02.0] where? | where? 1"]


def test_no_repeat_prints_what_changed(clip, model, capsys):
    assert run("watch", clip, "what?", "--every", 0.5, "--rate", 4, "--no-repeat") == 0
    assert capsys.readouterr().out.splitlines() == ["[0:00.5] what? 0", "[0:01.0] what? 1", "[0:02.0] what? 2"]
    assert len(model.session.asked) == 5


def test_json_is_one_object_a_line(clip, model, capsys):
    assert run("watch", clip, "what?", "where?", "--json", "--every", 1) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["time"], line["question"], line["answer"]) for line in lines[:2]] == [
        (1.0, "what?", "what?\n0"),
        (1.0, "where?", "where?\n0"),
    ]
    assert lines[0]["frames"] == [0, 1, 2] and lines[0]["tokens"] == {"total": 7}


def test_watch_hands_its_options_on(clip, model):
    layout = "slowfast-fast_3x3"
    assert run("watch", clip, "q", "--mode", "append", "--frames", 9, "--layout", layout, "--max-new-tokens", 4,
               "--model", "m", "--device", "cpu") == 0  # fmt: skip
    assert model.session.made == ("append", 9, layout, str(clip))
    assert model.session.asked[0][2] == 4
    assert (model.options["path"], model.options["device"]) == ("m", "cpu") and model.options["layout"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{clip}", " "], "the question is empty"),
        (["{clip}.mp4", "q"], "does not exist"),
        (["{clip}", "q", "--layout", "slowest"], "unknown layout"),
        (["{clip}", "q", "--mode", "newest"], "invalid choice"),
        (["{clip}", "q", "--mode", "append", "--reduction", "compress"], "--reduction"),
        (["{clip}", "q", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(argv, message, clip, model, capsys):
    assert run("watch", *(a.format(clip=clip) for a in argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and model.options is None


@pytest.mark.parametrize("option", [["--every", "0"], ["--rate", "-1"], ["--rate", "inf"], ["--every", "x"]])
def test_wrong_usage_is_exit_2(option, clip, capsys):
    assert run("watch", clip, "q", *option) == 2
    assert "above 0" in capsys.readouterr().err


def test_an_error_while_watching_leaves_what_was_printed(clip, model, capsys, monkeypatch):
    ask = Session.ask

    def fail_later(self, *args, **kwargs):
        if len(self.frames) > 3:
            raise ContextError("too long")
        return ask(self, *args, **kwargs)

    monkeypatch.setattr(Session, "ask", fail_later)
    assert run("watch", clip, "what?", "--every", 1) == 2
    assert capsys.readouterr() == ("[0:01] what? 0\n", "sfllava-fast: error: too long\n")
    assert model.session.closed


# --- its end, in a process of its own

SCRIPT = f"""
import sys
sys.path[:0] = {[os.path.dirname(module) for module in (__file__, clips.__file__)]!r}
from types import SimpleNamespace
from test_watch import Session
from sfllava_fast.cli import commands, main as cli
commands.load_model = lambda path, options: SimpleNamespace(open_stream=Session)
print("ready", flush=True)
code = cli.main()
import threading
assert not [t for t in threading.enumerate() if t.name == "sfllava-live"], "a thread goes on"
sys.exit(code)
"""


@contextlib.contextmanager
def started(*command):
    """A process with pipes, which has ended behind it."""
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    # A background job inherits an ignored SIGINT, and Python then leaves it ignored.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def watching(*argv):
    with started(sys.executable, "-c", SCRIPT, "watch", *map(str, argv)) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process


@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    path = tmp_path_factory.mktemp("watch") / "clip.mkv"
    clips.ffmpeg(*clips.SOURCE, *clips.H264, "-bf", "0", "-live", "1", path)
    return path.read_bytes()


def test_ctrl_c_while_a_pipe_stalls(stream):
    with watching("-", "what?", "--every", 0.5, "--rate", 4) as process:
        process.stdin.write(stream[: len(stream) * 3 // 4])
        process.stdin.flush()
        assert process.stdout.readline() == b"[0:00.5] what? 0\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        out, err = process.stdout.read(), process.stderr.read()
    assert err == b"interrupted\n" and b"Traceback" not in out


def test_ctrl_c_before_the_first_frame(stream):
    with watching("-", "what?") as process:
        process.stdin.write(stream[:100])
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"interrupted\n")


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """A drawn clip of 8 seconds in which an orange cross appears after 5.1."""
    from sfllava_fast.embedded.scenes import draw_scene, write_video

    scene = draw_scene("watch/1")
    assert [round(8 * thing.start, 1) for thing in scene.things if thing.name == "orange cross"] == [5.1]
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    write_video(scene, path)
    return path


APPEARED = "does the video show a orange cross?"


@pytest.mark.parametrize("mode", ["slowfast", "memory"])
def test_the_embedded_model_sees_what_appears(mode, scene, capsys):
    assert run("watch", scene, APPEARED, "--mode", mode, "--every", 1, "--rate", 4, "--no-repeat") == 0
    assert capsys.readouterr() == ("[0:01] no\n[0:06] yes\n", f"sfllava-fast: warning: {CAVEAT}\n")


def test_the_embedded_model_answers_while_a_pipe_stalls(scene):
    video = clips.ffmpeg("-i", scene, "-f", "yuv4mpegpipe", "-")
    frame = len(b"FRAME\n") + 192 * 192 * 3 // 2
    head = len(video) - 64 * frame
    command = sys.executable, "-m", "sfllava_fast", "watch", "-", APPEARED, "--rate", "4", "--json"
    with started(*command) as process:
        process.stdin.write(video[: head + 20 * frame])
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        assert process.poll() is None
        out, err = process.communicate(video[head + 20 * frame :], timeout=250)
    told = [first, *map(json.loads, out.splitlines())]
    assert (process.returncode, err.decode()) == (0, f"sfllava-fast: warning: {CAVEAT}\n")
    assert {line["caveat"] for line in told} == {CAVEAT}
    assert [line["time"] for line in told] == [2, 4, 6, 7.75]
    assert [line["answer"] for line in told] == ["no", "no", "yes", "yes"]
    assert told[0]["frames"] == list(range(9)) and told[0]["video"] == "standard input"


def test_a_reader_that_leaves_ends_it(stream):
    with watching("-", "what?", "--every", 0.1, "--rate", 10) as process:
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stream)
            process.stdin.flush()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_a_writer_that_leaves_ends_it(stream):
    with watching("-", "what?") as process:
        out, err = process.communicate(stream[: len(stream) * 3 // 4], timeout=60)
        assert process.returncode == 0
    assert out.startswith(b"[0:01] what? ") and err == b""
