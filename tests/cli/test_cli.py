"""The command line: what it prints where, its exit codes, and one line for every wrong input."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import clips
import pytest

import sfllava_fast
from sfllava_fast.cli import commands, progress
from sfllava_fast.cli import main as cli
from sfllava_fast.engine.options import ModelOptions
from sfllava_fast.errors import ContextError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.sampling import sample_frames

Image = pytest.importorskip("PIL.Image")

LAYOUT = "slowfast-slow_4frms_spatial_1d_max_pool-fast_2x2"
SECONDS = dict.fromkeys(
    ("decode", "preprocess", "wait", "vision", "projector", "aggregate", "prefill", "generate"), 0.5
)
JSON_FIELDS = {
    "answer",
    "video",
    "question",
    "model",
    "layout",
    "frames",
    "slow_frames",
    "tokens",
    "backend",
    "attention",
    "seconds",
    "ttft",
    "tokens_per_second",
}


@pytest.fixture
def folder(tmp_path):
    """A video of 12 image frames."""
    path = tmp_path / "frames"
    path.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path / f"{number}.png")
    return str(path)


class StandIn:
    """An engine that answers at once, and remembers what it was asked."""

    def __init__(self, path, **options):
        self.options = options | {"path": path}
        self.layout = parse_layout(options.get("layout") or LAYOUT)
        self.error = None
        self.asked = []

    def open(self, video, frames=None):
        self.video, self.frames = video, frames
        return self

    def ask(self, question, choices=None, max_new_tokens=None, follow_up=False, on_token=None):
        self.asked.append(dict(question=question, max_new_tokens=max_new_tokens, choices=choices, follow_up=follow_up))
        if self.error:
            raise self.error
        video = self.video
        indices = sample_frames(video.total, self.frames or 8)
        plan = self.layout.plan(len(indices), (8, 8))
        on_token("a")
        fields = dict(
            video=str(video.path),
            question=question,
            choices=choices,
            model="stand-in",
            layout=str(self.layout),
            frames=indices,
            slow_frames=[indices[i] for i in plan.slow_frames],
            tokens=dict(plan.tokens),
            backend="torch",
            attention="sdpa",
            dtype="float32",
            device="cpu",
            seconds=dict(SECONDS),
            ttft=2.5,
            tokens_per_second=12.5,
            reduction=self.options.get("reduction"),
            kept=7,
        )
        return SimpleNamespace(
            text="a red circle",
            choice=None if choices == ["neither", "nor"] else choices and choices[0],
            **fields,
            to_json=lambda: {"answer": "a red circle", **fields},
        )


@pytest.fixture
def engine(monkeypatch):
    """The stand-in that the next command loads, as a list that fills with it."""
    loaded = []

    def load(path, options):
        loaded.append(StandIn(path, **vars(options)))
        loaded[-1].error = load.error
        return loaded[-1]

    load.error = None
    monkeypatch.setattr(commands, "load_model", load)
    loaded_by = SimpleNamespace(models=loaded, fail=lambda error: setattr(load, "error", error))
    return loaded_by


def run(*argv):
    return cli.main([str(a) for a in argv])


def test_ask_prints_the_answer_alone_on_stdout(folder, engine, capsys):
    assert run("ask", folder, "what is it?") == 0
    out, err = capsys.readouterr()
    assert out == "a red circle\n"
    assert "slow 128 + fast 32 = 160" in err and "generate 0.500" in err and "12.5 tokens/s" in err
    assert len(err.splitlines()) == 3


def test_ask_names_the_tokens_of_any_layout(folder, engine, capsys):
    assert run("ask", folder, "what is it?", "--layout", "llava_video_slowfast-newline_grid") == 0
    err = capsys.readouterr().err
    # Of 8 frames the first is slow, 4x4 with 4 newlines; the others are 2x2 with 2.
    assert "frames   8, 1 of them slow; tokens: slow 16 + fast 28 + newline 18 + separator 8 = 70\n" in err
    assert run("ask", folder, "what is it?", "--layout", "pllava") == 0
    assert "frames   8; tokens: pool 2,304 = 2,304\n" in capsys.readouterr().err


def test_ask_hands_its_options_on(folder, engine, capsys):
    code = run(
        "ask",
        folder,
        "what?",
        "--model",
        "m",
        "--layout",
        "slowfast-fast_3x3",
        "--frames",
        "5",
        "--backend",
        "torch",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--attention",
        "eager",
        "--projector",
        "commuted",
        "--reduction",
        "mixture:0.3",
        "--max-new-tokens",
        "7",
        "--decoder",
        "decord",
        "--choices",
        "a cat",
        "a dog",
    )
    assert code == 0
    model = engine.models[0]
    assert model.options == vars(ModelOptions()) | dict(
        path="m",
        layout="slowfast-fast_3x3",
        backend="torch",
        dtype="bfloat16",
        device="cpu",
        attention="eager",
        projector="commuted",
        reduction="mixture:0.3",
    )
    assert model.frames == 5
    assert model.asked == [dict(question="what?", max_new_tokens=7, choices=["a cat", "a dog"], follow_up=False)]
    said = capsys.readouterr()
    assert said.out == "a cat\n" and ", 7 kept by mixture:0.3\n" in said.err


@pytest.mark.parametrize("follow_up", [False, True])
def test_several_questions_are_asked_of_one_session(folder, engine, capsys, follow_up):
    assert run("ask", folder, "what is it?", "and why?", *["--follow-up"] * follow_up) == 0
    assert capsys.readouterr().out == "a red circle\n" * 2
    (model,) = engine.models
    assert [(a["question"], a["follow_up"]) for a in model.asked] == [("what is it?", False), ("and why?", follow_up)]


def test_json_is_one_object_alone_on_stdout(folder, engine, capsys):
    assert run("ask", folder, "what?", "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert set(answer) >= JSON_FIELDS and set(answer["tokens"]) == {"slow", "fast", "total"}
    assert answer["seconds"]["decode"] > SECONDS["decode"]  # with the opening of the video
    assert err == "" and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "{folder}", ""], "the question is empty"),
        (["ask", "{folder}", "  \n"], "the question is empty"),
        (["ask", "{folder}", "what?", ""], "the question is empty"),
        (["ask", "{folder}/none.mp4", "what?"], "does not exist"),
        (["ask", "{folder}", "what?", "--layout", "slowest"], "unknown layout 'slowest'"),
        (["ask", "{folder}", "what?", "--decoder", "vlc"], "invalid choice: 'vlc'"),
        (["ask", "{folder}", "what?", "--backend", "cuda", "--device", "cpu"], "backend cuda cannot run"),
        (["ask", "{folder}", "what?", "--device", "tpu"], "tpu"),
        (["ask", "{folder}", "what?", "--choices", "a"], "2 to 26 texts"),
        (["ask", "{folder}", "--choices", "a", "b", "what"], "put the question before --choices"),
        (["ask", "{folder}", "--choices", "a", "b", "what?"], "--choices took 'what?'"),
        (["ask", "{folder}", "what?", "--choices", "a", "b", "and why?"], "--choices took 'and why?'"),
        (["ask", "--choices", "a", "b", "{folder}", "what"], "put the question before --choices"),
        (["inspect", "{folder}", "--out", "{folder}/a.jpg"], "end in .png or .html"),
        (["inspect", "{folder}", "--out", "{folder}/a.html", "--grid", "1x1"], "leaves no token"),
        (["inspect", "{folder}", "--out", "{folder}/a.html", "--model", "{folder}"], "no config.json"),
        (["inspect", "{folder}", "--out", "{folder}/a.html", "--layout", ""], "unknown layout ''"),
        (["inspect", "{folder}", "--out", "{folder}/a.png", "--layout", "pllava-avg"], "unknown layout 'pllava-avg'"),
        (["inspect", "{folder}", "--out", "{folder}/a.png", "--layout", "a:stride50,each,each,max"], "no token of"),
        (["demo", "--out", "{folder}/0.png/new"], "0.png is not a folder"),
        (["inspect", "{folder}", "--out", "{folder}/0.png/new/a.png"], "0.png is not a folder"),
        (["bench", "--json", "{folder}/0.png/a.json"], "0.png is not a folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(argv, message, folder, engine, capsys):
    before = sorted(os.listdir(folder))
    assert run(*(a.format(folder=folder) for a in argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("sfllava-fast: error: ") and message in err
    assert engine.models == [] and sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["ask"],
        ["ask", "video"],
        ["sing"],
        ["ask", "v", "q", "--frames", "0"],
        ["ask", "v", "q", "--frames", "many"],
        ["ask", "v", "q", "--max-new-tokens", "-1"],
        ["inspect", "v"],
        ["inspect", "v", "--out", "a.png", "--grid", "24"],
        ["inspect", "v", "--out", "a.png", "--grid", "0x4"],
        ["ask", "v", "q", "--colour"],
    ],
)
def test_wrong_usage_is_exit_2(argv, capsys):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sfllava-fast: error: ") and err.count("\n") == 1 and "--help` shows how" in err


def test_nothing_at_all_is_asked_for_help(capsys):
    assert run() == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: sfllava-fast") and "examples:" in out and err == ""


def test_questions_and_choices_in_any_order_that_can_be_read(folder, engine):
    for argv in (
        ["what?", "--choices", "a", "b"],
        ["--choices", "a", "b", "--frames", "3", "what?"],
        ["--choices", "why?", "who?", "--", "what?"],
    ):
        head = ["ask"] if "--" in argv else ["ask", folder]
        tail = [*argv[:-1], folder, argv[-1]] if "--" in argv else argv
        assert run(*head, *tail) == 0
        (asked,) = engine.models.pop().asked
        assert asked["question"] == "what?" and asked["choices"] == [argv[argv.index("--choices") + i] for i in (1, 2)]


def test_names_in_options_are_those_of_the_modules():
    from sfllava_fast import video
    from sfllava_fast.cli import options
    from sfllava_fast.engine.slowfast_llava import STREAM_MODES
    from sfllava_fast.installed_parts import import_part
    from sfllava_fast.model import attention, checkpoint
    from sfllava_fast.ops import projector
    from sfllava_fast.ops.backends import aggregate as backends

    assert options.BACKENDS == backends.NAMES and options.ATTENTIONS == attention.CHOICES
    assert options.PROJECTORS == projector.MODES and tuple(checkpoint.DTYPES) == options.DTYPES
    assert options.MODES == STREAM_MODES
    with pytest.raises(sfllava_fast.SfllavaError, match=f"choose (one of )?{', '.join(options.DECODERS)}$"):
        video.import_decoder("none")
    import_part("_bench", "bench")
    from sfllava_fast._bench.pipeline import dummy

    assert sorted(options.SHAPES) == sorted(dummy.NAMES)


@pytest.mark.parametrize("command", ["ask", "watch", "batch", "score", "inspect", "layouts", "info", "demo"])
def test_help_teaches_by_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"sfllava-fast {command}" in capsys.readouterr().out.split("example")[-1]


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sfllava-fast {sfllava_fast.__version__}\n"


def test_errors_of_the_engine_are_one_line(folder, engine, capsys):
    engine.fail(ContextError("the prompt is too\nlong: ask less"))
    assert run("ask", folder, "what?") == 2
    assert capsys.readouterr().err == "sfllava-fast: error: the prompt is too long: ask less\n"


def test_interrupted(folder, engine, capsys):
    engine.fail(KeyboardInterrupt())
    assert run("ask", folder, "what?") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_bug_of_ours_is_a_line_and_with_debug_a_traceback(folder, engine, capsys):
    engine.fail(ZeroDivisionError("a\nbug\x1b[31m"))
    assert run("ask", folder, "what?") == 70
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "please report it" in err and "--debug" in err
    assert "ZeroDivisionError at test_cli.py:" in err and "a bug\\x1b[31m" in err
    for argv in (["--debug", "ask"], ["ask", "--debug"]):
        assert run(*argv, folder, "what?") == 70
        err = capsys.readouterr().err
        assert err.startswith("Traceback (most recent call last)") and "\x1b" not in err and "please report" in err
    engine.fail(ContextError("too long"))
    assert run("ask", folder, "what?", "--debug") == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (MemoryError(), "out of memory"),
        (ModuleNotFoundError("x", name="PIL.Image"), "needs PIL, which is not installed: pip install pillow"),
        (ModuleNotFoundError("x", name="rich"), "needs rich, which is not installed: pip install rich"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(error, line, folder, engine, capsys):
    engine.fail(error)
    assert run("ask", folder, "what?") == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\x9b\x85\u202eb\ud83d"
ESCAPED = r"a\x1b]0;title\x07\x1b[2J\r\x9b\x85\u202eb\ud83d"


def test_a_terminal_obeys_no_answer(folder, engine, capsys, monkeypatch):
    ask = StandIn.ask

    def hostile(self, *args, **options):
        answer = ask(self, *args, **options)
        progress.log.warning("unknown words: %s", HOSTILE)
        answer.text = HOSTILE + "\n\ttab"
        answer.to_json = lambda: {"answer": HOSTILE}
        return answer

    monkeypatch.setattr(StandIn, "ask", hostile)
    assert run("ask", folder, "what?") == 0
    out, err = capsys.readouterr()
    assert out == ESCAPED + "\n\ttab\n" and f"sfllava-fast: warning: unknown words: {ESCAPED}\n" in err
    assert run("ask", folder, "what?", "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"answer": HOSTILE} and out.isprintable() is False and out[:-1].isprintable()
    assert run("ask", folder + "/" + HOSTILE, "what?") == 2
    in_one_line = ESCAPED.replace(r"\r", " ").replace(r"\x85", " ")
    assert f"{in_one_line} cannot be opened" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_of_any_bytes(encoding, tmp_path):
    from sfllava_fast import embedded

    name = tmp_path / os.fsdecode(b"\xff\xc3\xa9$x_{y\x1b.mp4")
    name.write_bytes(embedded.sample_video().read_bytes())
    made = name.with_suffix(".folder")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = shell("ask", name, embedded.sample_questions()[0], "--json", env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout)["video"] == str(name) and json.loads(done.stdout)["caveat"] is None
    done = shell("inspect", name, "--out", made / "a.html", "--frames", "4", env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "\x1b" not in done.stdout and (made / "a.html").exists()


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from sfllava_fast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def without(blocked, *argv):
    command = [sys.executable, "-c", BLOCKED.format(blocked=set(blocked.split())), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["ask", "--help"], ["bench", "--help"], [], ["info"]])
def test_what_needs_no_torch(argv):
    done = without("torch transformers av PIL rich numpy matplotlib", *argv)
    assert done.returncode == 0 and done.stdout and done.stderr == "", done.stderr
    if argv == ["info"]:
        told = " ".join(done.stdout.split())  # of several lines
        assert "torch cannot be imported" in told and "pip install torch" in told


@pytest.mark.parametrize(
    ("blocked", "argv", "install"),
    [
        ("torch", ["ask", "{video}", "q"], "pip install torch"),
        ("torch", ["watch", "{video}", "q"], "pip install torch"),
        ("torch", ["batch", "{rows}", "--out", "{out}"], "pip install torch"),
        ("torch", ["inspect", "{video}", "--out", "{out}.html"], "pip install torch"),
        ("torch", ["demo", "--out", "{out}"], "pip install torch"),
        ("transformers", ["ask", "{video}", "q"], "pip install"),
        ("av", ["ask", "{video}", "q"], "pip install"),
        ("av", ["watch", "{video}", "q"], "pip install"),
        ("PIL matplotlib", ["inspect", "{video}", "--out", "{out}.png"], "pip install"),
        ("rich", ["demo", "--out", "{out}"], "pip install rich"),
        ("rich", ["bench", "--rounds", "1"], "pip install"),
    ],
)
def test_a_library_that_is_missing_is_a_line(blocked, argv, install, tmp_path):
    from sfllava_fast import embedded

    (tmp_path / "rows.jsonl").write_text('{"id": 1, "video": "v", "question": "q"}\n')
    places = {"video": embedded.sample_video(), "rows": tmp_path / "rows.jsonl", "out": tmp_path / "out"}
    done = without(blocked, *(part.format(**places) for part in argv))
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("sfllava-fast: error: ") and done.stderr.count("\n") == 1 and install in done.stderr


def test_the_embedded_model_says_that_it_knows_drawn_shapes_only(folder, capsys):
    from sfllava_fast import embedded

    assert run("ask", folder, "what does the sign say?", "--frames", 4, "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["model"], answer["caveat"]) == ("embedded", embedded.CAVEAT)
    assert err == f"sfllava-fast: warning: {embedded.CAVEAT}\n" and "drawn shapes only" in err


@pytest.mark.parametrize("argv", [["-v", "ask"], ["ask", "-v"]])
def test_verbose_shows_information(argv, folder, engine, capsys, monkeypatch):
    ask = StandIn.ask
    monkeypatch.setattr(StandIn, "ask", lambda *a, **k: (progress.log.info("a detail"), ask(*a, **k))[1])
    assert run(*argv, folder, "what?") == 0
    assert "sfllava-fast: info: a detail" in capsys.readouterr().err
    assert run("ask", folder, "what?") == 0
    assert "a detail" not in capsys.readouterr().err


def test_inspect_draws_and_prints_the_path(folder, tmp_path, capsys):
    out = tmp_path / "a.html"
    assert run("inspect", folder, "--out", out, "--layout", LAYOUT, "--frames", 6, "--grid", "8x8") == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "152 video tokens" in out.read_text()


def test_inspect_takes_the_layout_of_a_checkpoint(folder, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"image_size": 84, "patch_size": 14},
        "sfllava_fast": {"layout": "slowfast-fast_2x3", "frames": 5},
    }
    (model / "config.json").write_text(json.dumps(config))
    assert run("inspect", folder, "--out", tmp_path / "a.html", "--model", model) == 0
    text = (tmp_path / "a.html").read_text()
    assert "30 video tokens" in text and "6\u00d76 patches" in text


def test_inspect_takes_the_frames_and_grid_of_a_layout_that_has_a_name(folder, tmp_path):
    out = tmp_path / "a.html"
    assert run("inspect", folder, "--out", out, "--layout", "red_villm") == 0
    text = out.read_text()
    assert "16\u00d716 patches a frame" in text and "RED-VILLM" in text and "zeros 88" in text
    assert run("inspect", folder, "--out", out, "--layout", "ig_vlm", "--grid", "6x6") == 0
    assert "6 of 12 frames" in out.read_text() and "36 video tokens" in out.read_text()
    assert run("inspect", folder, "--out", out, "--layout", "uniform", "--frames", "3", "--grid", "6x6") == 0
    assert "108 video tokens" in out.read_text()


def test_inspect_takes_the_grid_of_a_checkpoint_in_the_original_format(folder, tmp_path):
    model = tmp_path / "model"
    (model / "clip").mkdir(parents=True)
    vision = {"model_type": "clip_vision_model", "image_size": 84, "patch_size": 14}
    (model / "clip" / "config.json").write_text(json.dumps(vision))
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}
    (model / "config.json").write_text(json.dumps(config))
    command = "inspect", folder, "--out", tmp_path / "a.html", "--layout", LAYOUT, "--frames", 6, "--model", model
    assert run(*command) == 0
    assert "6\u00d76 patches" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("options, verbose, shown", [([], False, False), (["error"], False, True), ([], True, True)])
def test_warnings_of_libraries_are_shown_when_asked_for(options, verbose, shown, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", options)
    with pytest.raises(FutureWarning) if shown else nullcontext(), progress.messages(verbose):
        warnings.warn("old", FutureWarning, stacklevel=2)


def test_info_as_a_table_and_as_json(capsys):
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert run("info") == 0
    table = capsys.readouterr().out
    for section, rows in facts.items():
        assert f"{section}\n" in table
        for name, value in rows.items():
            assert name in table and " ".join(str(value).split()) in " ".join(table.split())


def shell(*argv, **options):
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, "-m", "sfllava_fast", *map(str, argv)], **options)


def test_the_embedded_model_answers_from_the_shell(tmp_path):
    from sfllava_fast import embedded

    video = embedded.sample_video()
    done = shell("ask", video, embedded.sample_questions()[0], "--json", "--frames", "8")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= JSON_FIELDS
    assert answer["video"] == str(video) and len(answer["frames"]) == 8
    assert answer["tokens"]["total"] == answer["tokens"]["slow"] + answer["tokens"]["fast"]
    assert set(answer["seconds"]) == set(SECONDS)


def test_an_answer_that_is_none_of_the_choices_is_said_to_be(folder, engine, capsys):
    assert run("ask", folder, "what?", "--choices", "neither", "nor") == 0
    out, err = capsys.readouterr()
    assert out == "a red circle\n" and err.splitlines()[0] == "sfllava-fast: warning: the answer is none of the choices"
    assert run("ask", folder, "what?", "--choices", "a", "b") == 0
    assert "none of the choices" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *cli._COMMANDS])
def test_help_fits_80_columns_and_its_commands_can_be_pasted(command, monkeypatch, capsys):
    told = {}
    for columns in (80, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run(*filter(None, [command]), "--help") == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns
        pasted = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("    sfllava-fast ")]
        told[columns] = list(map(shlex.split, pasted))
    assert told[80] == told[300]


def test_info_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    reason = "sdpa (cpu): " + "a reason that goes on and on, " * 5
    monkeypatch.setattr("sfllava_fast.cli.info.report", lambda: {"attention": {"auto takes": reason}})
    assert run("info") == 0
    section, *rows = capsys.readouterr().out.splitlines()
    assert section == "attention" and rows[0].startswith("  auto takes  sdpa") and max(map(len, rows)) <= 80
    assert all(row.startswith(" " * 14) for row in rows[1:]) and len(rows) > 2
    assert " ".join("".join(rows).split()) == f"auto takes {reason.strip()}"


def test_demo(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from sfllava_fast import embedded

    monkeypatch.setenv("COLUMNS", "200")
    tmp_path = tmp_path / "new" / "folder"
    assert run("demo", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    for text in (*embedded.sample_questions(), *embedded.sample_answers(), "aggregate", "slow", "fast"):
        assert text in out
    assert out.rstrip().endswith(str(tmp_path / "sfllava_fast_demo.png")) and err == ""
    assert Image.open(tmp_path / "sfllava_fast_demo.png").size[0] > 1000


def test_wrong_input_from_the_shell(tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clips.make(tmp_path, "plain.mp4").read_bytes()[:4000])
    done = shell("ask", cut, "what?")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sfllava-fast: error: {cut} is cut short") and done.stderr.count("\n") == 1


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = shell("info", stdout=writer, stderr=subprocess.PIPE, capture_output=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_from_the_shell(tmp_path):
    # Watching a pipe waits for its writer, so the signal comes in the middle.
    pipe = tmp_path / "clip.mp4"
    os.mkfifo(pipe)
    script = (
        "import sys; from sfllava_fast.cli import main as cli; from sfllava_fast.engine import slowfast_llava; "
        "print('ready', flush=True); sys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "watch", str(pipe), "what?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job inherits an ignored SIGINT, and Python then leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
