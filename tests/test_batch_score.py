"""Scores: multiple choice by the published option rule, open-ended by a judge whose verdicts are kept."""

import json

import pytest
from openai_server import serving

from sfllava_fast import cli
from sfllava_fast.errors import InputError, ServerError
from sfllava_fast.offline.score import read_verdict, score


def line(key, answer="yes", **more):
    return {"id": key, "video": f"v{key}", "question": f"what {key}?", "ok": True, "answer": answer} | more


def write(tmp_path, *lines):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    return path


def published_option(text):
    """The published rule for five options, written from its description."""
    option = text[0].lower() if text[0] in "abcdeABCDE" else "none"
    rest = text[text.index("answer is") :] if "answer is " in text else text
    marked = [letter for letter in "ABCDE" if f"{letter}:" in rest or f"{letter})" in rest]
    return marked[0].lower() if marked else option


def test_multiple_choice_by_the_published_rule(tmp_path):
    choices = ["one", "two", "three", "four", "five"]
    texts = ["A", "b", "C) three", "(D)", "none of these", "the answer is E: five", "A or B)", "x: 3", "Ee", "D: four"]
    lines = [
        line(f"{i}.{number}", text, choices=choices, answer_number=number, task_name="odd" if number % 2 else "even")
        for i, text in enumerate(texts)
        for number in range(5)
    ]
    figures = score(write(tmp_path, *lines), by="task_name")
    right = [row for row in lines if published_option(row["answer"]) == "abcde"[row["answer_number"]]]
    assert figures["all"].choice_right == len(right) == 8 and figures["all"].choice_wrong == 42
    of_odd = sum(row["task_name"] == "odd" for row in right)
    assert figures["task_name odd"].choice_right == of_odd > 0
    assert figures["task_name even"].choice_right == len(right) - of_odd > 0


def test_the_truth_is_found_among_the_choices(tmp_path):
    choices = ["one", "two"]
    lines = [line(1, "B", choices=choices, truth="two"), line(2, "A", choices=choices, truth="two")]
    lines += [line(3, "A", choices=choices, truth="2"), line(4, "A", choices=choices)]
    told = score(write(tmp_path, *lines))["all"].to_json()
    assert told["multiple_choice"] == {"accuracy": 0.5, "right": 1, "wrong": 1} and told["without_truth"] == 2
    assert told["open_ended"] is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"pred": "yes", "score": 5}', ("yes", 5)),
        ("{'pred': 'no', 'score': 0}", ("no", 0)),
        ("{'pred': 'yes', 'score': 4.8}", ("yes", 4)),
        ('```json\n{"pred": "Yes",\n "score": "3"}\n``` as asked', ("yes", 3)),
        ('{"score": 2, "pred": "NO", "why": "no"}', ("no", 2)),
    ],
)
def test_verdicts(text, verdict):
    assert read_verdict(text) == dict(zip(("pred", "score"), verdict))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes, 5",
        "{}",
        "[1]",
        '{"pred": "maybe", "score": 3}',
        '{"pred": "yes"}',
        '{"pred": "yes", "score": 6}',
        '{"pred": "yes", "score": -1}',
        '{"pred": "yes", "score": Infinity}',
        '{"pred": "yes", "score": null}',
        "{'pred': yes}",
        "{__import__('os')}",
    ],
)
def test_what_is_no_verdict(text):
    with pytest.raises(ServerError, match="the judge gave no verdict"):
        read_verdict(text)


def graded(body):
    """A judge who finds an answer right if it is the reference."""
    asked = dict(row.split(": ", 1) for row in body["messages"][-1]["content"].splitlines() if ": " in row)
    same = asked["Reference answer"] == asked["Answer of the model"]
    return json.dumps({"pred": "yes" if same else "no", "score": 5 if same else 1})


def test_open_ended_by_a_judge_whose_verdicts_are_kept(tmp_path, capsys):
    said = "a cat {in}: a box"
    lines = [line(i, said, truth=said if i % 3 else "a dog", kind=i % 2) for i in range(7)]
    lines += [line("none", ok=False, truth="a"), line("free"), line("choice", "A", choices=["x", "y"], truth="x")]
    path = write(tmp_path, *lines)
    with serving(graded) as server:
        figures = score(path, server.url, by="kind", workers=2)
        assert figures["all"].to_json() == {
            "multiple_choice": {"accuracy": 1.0, "right": 1, "wrong": 0},
            "open_ended": {"accuracy": 4 / 7, "right": 4, "wrong": 3, "mean_score": 23 / 7},
            "unanswered": 1,
            "without_truth": 1,
            "not_judged": 0,
        }
        assert figures["kind 1"].judged_right == 2 and figures["kind 0"].judged_wrong == 2
        assert len(server.requests) == 7 and server.requests[0]["temperature"] == 0
        verdicts = tmp_path / "answers.judged.jsonl"
        kept = verdicts.read_text().splitlines(keepends=True)
        assert len(kept) == 7
        # Two verdicts and half of another are lost: three are asked for again.
        verdicts.write_text("".join(kept[:4]) + kept[4][:30])
        assert cli.main(["score", str(path), "--judge", server.url, "--json"]) == 0
        assert len(server.requests) == 10
    told = json.loads(capsys.readouterr().out)
    assert told == {"all": figures["all"].to_json()}


def test_answers_that_the_judge_cannot_grade_are_counted_apart(tmp_path, capsys):
    path = write(tmp_path, line(1, "good", truth="good"), line(2, "odd", truth="x"))
    with serving(lambda body: "no idea" if "odd" in body["messages"][-1]["content"] else graded(body)) as server:
        assert cli.main(["score", str(path), "--judge", server.url]) == 0
        assert len(server.requests) == 4  # three attempts
        assert capsys.readouterr().out == "all: open-ended 100.0 % (1 of 1), mean score 5.00; 1 not judged\n"
        server.answer = graded
        assert cli.main(["score", str(path), "--judge", server.url, "--retry-errors"]) == 0
    assert capsys.readouterr().out == "all: open-ended 50.0 % (1 of 2), mean score 3.00\n"


@pytest.mark.parametrize(
    ("field", "changed", "right"),
    [
        ("prediction", {"answer": "b"}, 0),
        ("truth", {"truth": "b"}, 0),
        ("question", {"question": "and now?"}, 1),
        ("video", {"video": "w"}, 1),
    ],
)
def test_verdicts_on_what_is_another_now_are_refused_or_replaced(field, changed, right, tmp_path):
    with serving(graded) as server:
        score(write(tmp_path, line(1, "a", truth="a"), line(2, "a", truth="a")), server.url)
        path = write(tmp_path, line(1, "a", truth="a") | changed, line(2, "a", truth="a"))
        with pytest.raises(InputError, match=rf"under the ids 1 \(another {field}\): name another file, or replace"):
            score(path, server.url)
        assert score(path, server.url, retry_changed=True)["all"].judged_right == 1 + right
        assert len(server.requests) == 3 and len((tmp_path / "answers.judged.jsonl").read_text().splitlines()) == 2


def test_without_a_judge_open_ended_answers_are_not_judged(tmp_path, capsys):
    assert cli.main(["score", str(write(tmp_path, line(1, truth="a")))]) == 0
    assert capsys.readouterr().out == "all: 1 not judged\n"
    assert not list(tmp_path.glob("*judged*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "not JSON"), ("", "no answers"), ('{"id": 1}\n', "no answers"), ("[]\n", "no answ")],
)
def test_wrong_files_are_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    assert cli.main(["score", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sfllava-fast: error: ") and message in err and err.count("\n") == 1
