"""Question files: our own lines and the published forms, and one line for each wrong one."""

import json
import os

import pytest

from sfllava_fast.batch.answerers import model_answerer
from sfllava_fast.batch.questions import Question, by_video, find_video, read_questions
from sfllava_fast.batch.stamps import stamp_video
from sfllava_fast.engine.options import ModelOptions
from sfllava_fast.errors import InputError

OPEN_ENDED_CSV = """,video_id,answer,question,video_name,question_id,question_type
1,1201,someone,"who pours, slowly?",clip_162_169,1201_30933,0
2,1201,man,who cooks?,clip_162_169,1201_30934,0
"""
CHOICE_CSV = """,video_name,question,question_id,answer,video_id,question_type,a0,a1,a2,a3,a4
1,138,how did he not fall,138_CH_1,move,138,CH,jump,nod,push,play,move
"""
NUMBERED_CSV = """,video_name,frame_count,width,height,question,answer_number,question_id,question_type,a0,a1,answer
0,401,369,640,480,how do they play,1,4016,CH,roll,tap,tap
"""


def write(path, content):
    path.write_text(content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content))
    return path


def row(key, video="a.mp4", question="why?", **extra):
    return {"id": key, "video": video, "question": question, **extra}


def test_our_lines(tmp_path):
    rows = [row(1, answer="because", type=[3]), row("1", choices=["x", "y"]), row("\u2028", "b\u2028.mp4")]
    path = tmp_path / "q.jsonl"
    path.write_text("\ufeff" + "".join(f"{json.dumps(r, ensure_ascii=False)}\n\n" for r in rows), encoding="utf-8")
    questions = read_questions(path)
    assert questions == [
        Question(1, "a.mp4", "why?", None, {"truth": "because", "type": [3]}),
        Question("1", "a.mp4", "why?", ["x", "y"], {}),
        Question("\u2028", "b\u2028.mp4", "why?", None, {}),
    ]
    assert [(group.name, [q.id for q in group.questions]) for group in by_video(questions)] == [
        ("a.mp4", [1, "1"]),
        ("b\u2028.mp4", ["\u2028"]),
    ]
    assert questions[1].to_json() == row("1", choices=["x", "y"])


def test_published_csv_files(tmp_path):
    first, second = read_questions(write(tmp_path / "MSVD_QA.csv", OPEN_ENDED_CSV))
    assert (first.id, first.video, first.question) == ("1201_30933", "clip_162_169", "who pours, slowly?")
    assert first.choices is None and second.extra == {"video_id": "1201", "truth": "man", "question_type": "0"}
    (question,) = read_questions(write(tmp_path / "IntentQA.csv", CHOICE_CSV))
    assert question.choices == ["jump", "nod", "push", "play", "move"]
    assert question.extra == {"truth": "move", "video_id": "138", "question_type": "CH"}
    (question,) = read_questions(write(tmp_path / "NExT_QA.csv", NUMBERED_CSV))
    assert question.choices == ["roll", "tap"] and question.extra["answer_number"] == 1


def test_published_lists(tmp_path):
    asked = [{"video_name": "v", "question_id": f"v_{i}", "question": f"why {i}?"} for i in range(2)]
    truths = [{"answer": f"so {i}", "type": 0, "question_id": f"v_{i}"} for i in range(2)]
    asked_path, truths_path = tmp_path / "val_q.json", tmp_path / "val_a.json"
    asked_path.write_text(json.dumps(asked, indent=4))
    truths_path.write_text(json.dumps(truths))
    questions = read_questions(asked_path, truths_path)
    assert [q.extra for q in questions] == [{"truth": f"so {i}", "type": 0} for i in range(2)]
    assert [q.extra for q in read_questions(asked_path)] == [{}, {}]
    truths_path.write_text(json.dumps(truths[::-1]))
    with pytest.raises(InputError, match="val_a.json does not have the question_ids of .*val_q.json"):
        read_questions(asked_path, truths_path)
    choices = {"task_name": "IntentQA", "video_name": "v.mp4", "question_id": "q", "question": "why?"}
    choices |= {"answer_number": 1, "candidates": ["x", "y"], "answer": "y"}
    asked_path.write_text(json.dumps([choices]))
    (question,) = read_questions(asked_path)
    assert question.choices == ["x", "y"]
    assert question.extra == {"task_name": "IntentQA", "answer_number": 1, "truth": "y"}


def test_published_ids_that_repeat_are_told_apart_by_their_order(tmp_path):
    lines = OPEN_ENDED_CSV.replace("1201_30934", "1201_30933")
    assert [q.id for q in read_questions(write(tmp_path / "q.csv", lines))] == ["1201_30933", "1201_30933#2"]


def test_an_entry_of_two_questions_is_two_questions(tmp_path):
    entries = [
        {"video_name": "a", "question_id": "a_0", "question": ["what?", "which?"], "answer": "so"},
        {"video_name": "b", "question_id": "a_0", "question": "why?", "answer": "because"},
    ]
    path = tmp_path / "Video-ChatGPT-consistency_val_qa.json"
    path.write_text(json.dumps(entries))
    for questions in (read_questions(path), read_questions(path, path)):
        assert questions == [
            Question("a_0", "a", "what?", None, {"truth": "so"}),
            Question("a_0#2", "a", "which?", None, {"truth": "so"}),
            Question("a_0#3", "b", "why?", None, {"truth": "because"}),
        ]


def test_blanks_are_kept(tmp_path):
    lines = CHOICE_CSV.replace("how did he not fall", " how? ").replace("jump,nod", " jump,")
    (question,) = read_questions(write(tmp_path / "q.csv", lines))
    assert question.question == " how? " and question.choices == [" jump", "", "push", "play", "move"]


@pytest.mark.parametrize(
    "line",
    [
        '1,1201,man,"who cooks?,clip,id,0\n2,1201,man,"so, who?",clip,id2,0',
        '1,1201,man,"who cooks?,clip,id,0',
        '1,1201,man,"who "really" cooks?",clip,id,0',
        '1,1201,man,"who cooks?,clip,id,0\n' + "2,1201,man,who?,clip,id2,0\n" * 6000,
    ],
)
def test_a_stray_quote_is_one_line(line, tmp_path):
    lines = OPEN_ENDED_CSV.splitlines()[0] + f"\n{line}\n"
    with pytest.raises(InputError, match="around line [0-9]+ it is not CSV .*double its own") as raised:
        read_questions(write(tmp_path / "q.csv", lines))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("number", "read"), [("1", 1), ("B", "B"), ("", ""), ("1" * 5000, "1" * 5000), ("-1", "-1")])
def test_answer_numbers_of_csv_files(number, read, tmp_path):
    lines = NUMBERED_CSV.replace("play,1,", f"play,{number},")
    (question,) = read_questions(write(tmp_path / "q.csv", lines))
    assert question.extra["answer_number"] == read


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not JSON"),
        ('{"id": 1, "x": ' + "[" * 100_000, "line 1 is not JSON"),
        ([row(1, x=nested(64))], "line 1 has more than 64 nested lists and objects"),
        ([row(1), row(2), row(1)], "line 3 has the id 1 of line 1"),
        ([row(1)] * 6, "line 2 has .*; line 3 has .*; line 4 has .*; and 2 more$"),
        ([row(None)], "line 1 has no id"),
        ([row(True)], "line 1 has no id"),
        ([row(1.5)], "line 1 has no id"),
        ([row(1, video=3)], "line 1 has no video"),
        ([row(1, video="")], "line 1 has no video"),
        ([{"id": 1, "video": "a"}], "line 1 has no question"),
        ([row(1, question=["a", "b"])], "line 1 has no question"),
        ([row(1, choices="ab")], "line 1 has choices that are not a list"),
        ([row(1, ok=True)], "line 1 has the field 'ok'"),
        ('"text"', "line 1 is not an object"),
        ("[[1]]", "entry 1 is not an object"),
        ('{"id": 1}\n{"id"\n', "line 2 is not JSON"),
        ("[1, 2", "is not JSON"),
        ("", "has no questions"),
        ("[]", "has no questions"),
    ],
)
def test_wrong_files_are_one_line(content, message, tmp_path):
    path = write(tmp_path / "q.jsonl", content)
    with pytest.raises(InputError, match=message) as raised:
        read_questions(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("line", ["1,1201,man,who cooks?", "1,1201,man,who cooks?,clip,id,0,more"])
def test_a_csv_line_of_another_width(line, tmp_path):
    lines = OPEN_ENDED_CSV.splitlines()[0] + f"\n{line}\n"
    with pytest.raises(InputError, match="line 2 is not an object"):
        read_questions(write(tmp_path / "q.csv", lines))


def test_what_is_nested_less_is_read(tmp_path):
    assert read_questions(write(tmp_path / "q.jsonl", [row(1, x=nested(63))]))[0].extra["x"] == nested(63)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(tmp_path / "q.jsonl")


def test_videos_are_found_with_and_without_suffix(tmp_path):
    for name in ("a.mp4", "b.gif", "c"):
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()
    assert find_video(tmp_path, "a") == find_video(tmp_path, "a.mp4") == tmp_path / "a.mp4"
    assert find_video(tmp_path, "b") == tmp_path / "b.gif"
    assert find_video(tmp_path, "c") == tmp_path / "c" and find_video(tmp_path, "d") == tmp_path / "d"
    assert find_video(tmp_path / "x", str(tmp_path / "a")) == tmp_path / "a.mp4"
    for name in ("none", "n" * 300, "a\0b", "\ud83d"):
        assert find_video(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("folder", ["Activitynet_Zero_Shot_QA/all_test", "activitynet"])
def test_a_folder_whose_names_have_a_beginning_that_questions_leave_out(folder, tmp_path):
    folder, other = tmp_path / folder, tmp_path / "other"
    for place in (folder, other):
        place.mkdir(parents=True)
        for name in ("v_a.mkv", "b.mp4", "v_b.mp4"):
            (place / name).touch()
    assert find_video(folder, "a") == find_video(folder, "v_a") == folder / "v_a.mkv"
    assert find_video(folder, "b") == folder / "b.mp4", "a name that is there as it is, is meant"
    assert find_video(folder, "c") == folder / "c"
    assert find_video(other, "a") == other / "a", "elsewhere it would be another video"


def settings_of(model, folder, **options):
    """What `batch` notes of a model and its options."""
    return model_answerer(model, folder, ModelOptions(**options), None, "pyav", None)[1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "reduction/a.safetensors"])
def test_a_file_of_a_checkpoint_that_is_replaced_is_another_model(name, tmp_path):
    folder = tmp_path / "model"
    (folder / "reduction").mkdir(parents=True)
    for file in ("config.json", name):
        (folder / file).write_bytes(b"1234")
    os.utime(folder / name, ns=(5, 5))

    def settings():
        return settings_of(str(folder), tmp_path)

    before = settings()
    (folder / "README.md").write_text("a note")
    assert settings() == before and before["model_files"]
    for size, time in ((5, 5), (4, 6)):
        (folder / name).write_bytes(b"x" * size)
        os.utime(folder / name, ns=(time, time))
        assert settings()["model_files"] != before["model_files"]
    (folder / name).unlink()
    assert settings()["model_files"] != before["model_files"]


def test_a_file_of_a_reduction_that_is_replaced_is_another_one(tmp_path):
    file = tmp_path / "learned.safetensors"
    file.write_bytes(b"1")
    for reduction in (f"mixture:0.2:{file}", f"compress:{file}"):
        before = settings_of("owner/name", tmp_path, reduction=reduction)
        file.write_bytes(file.read_bytes() + b"1")
        after = settings_of("owner/name", tmp_path, reduction=reduction)
        assert before["reduction_file"] != after["reduction_file"]


def test_frames_of_a_folder_that_are_replaced_are_another_video(tmp_path):
    frames = tmp_path / "v"
    frames.mkdir()
    (frames / "1.png").write_bytes(b"1")
    before = stamp_video(frames)
    assert before == stamp_video(frames)
    (frames / "1.png").rename(frames / "2.png")
    assert before != stamp_video(frames)
