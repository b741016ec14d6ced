"""Scores: multiple choice by the published option rule, open-ended by a judge whose verdicts are kept."""

import json

import pytest
from openai_server import serving

from sfllava_fast.batch.score import rate, read_verdict, score, true_option
from sfllava_fast.cli import main as cli
from sfllava_fast.errors import InputError, ServerError

NAN = float("nan")


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


def test_an_option_that_batch_wrote_is_the_answer(tmp_path):
    """Of a model that was asked without the choices: its "blue" is not B."""
    choices = ["red", "green"]
    lines = [line(1, "blue", choices=choices, answer_number=1, option=None, openly=True)]
    lines += [line(2, "Green.", choices=choices, answer_number=1, option=1, openly=True)]
    figures = score(write(tmp_path, *lines))["all"]
    assert (figures.choice_right, figures.choice_wrong) == (1, 1)


def test_the_truth_is_found_among_the_choices(tmp_path):
    choices = ["one", "two"]
    lines = [line(1, "B", choices=choices, truth="two"), line(2, "A", choices=choices, truth="two")]
    lines += [line(3, "A", choices=choices, truth="2"), line(4, "A", choices=choices)]
    told = score(write(tmp_path, *lines))["all"].to_json()
    assert told["multiple_choice"] == {"accuracy": 0.5, "right": 1, "wrong": 1} and told["without_truth"] == 2
    assert told["open_ended"] is None


@pytest.mark.parametrize(
    ("truth", "found"),
    [
        ({"answer_number": 1}, 1),
        ({"answer_number": "1"}, 1),
        ({"answer_number": "B"}, 1),
        ({"answer_number": "b"}, 1),
        ({"answer_number": 1.0}, 1),
        ({"answer_number": "0", "truth": "a dog"}, 0),
        ({"answer_number": "", "truth": "a dog"}, 1),
        ({"answer_number": None, "truth": " a dog "}, 1),
        ({"truth": "B"}, 1),
        ({"answer_number": 7}, None),
        ({"answer_number": -1}, None),
        ({"answer_number": 0.5}, None),
        ({"answer_number": NAN}, None),
        ({"answer_number": "7", "truth": "a dog"}, None),
        ({"answer_number": "C"}, None),
        ({"answer_number": "\u00b2"}, None),
        ({"answer_number": True}, None),
        ({"answer_number": [1]}, None),
        ({"answer_number": {}}, None),
        ({"truth": "1"}, None),
        ({"truth": "a horse"}, None),
        ({"truth": None}, None),
        ({}, None),
    ],
)
def test_what_names_the_right_choice(truth, found, tmp_path):
    numbers = line(2, "x", choices=[1, 2], truth="2")
    told = score(write(tmp_path, line(1, "B) a dog", choices=["a cat", "a dog"], **truth), numbers))["all"]
    assert (told.choice_right, told.choice_wrong, told.without_truth) == (found == 1, (found == 0) + 1, found is None)


def test_a_letter_that_is_also_a_choice_is_no_letter():
    assert true_option({"choices": ["b", "a"], "truth": "a"}) == 1
    assert true_option({"choices": ["b", "a"], "truth": "A"}) is None


def test_the_option_rule_is_the_published_one_or_ours(tmp_path):
    choices = ["The cat.", "A dog runs.", "C opens the box."]
    texts = {"A dog runs.": (0, 1), "C opens the box.": (2, 2), "the cat": (None, 0), "B or E)": (None, 1), "B": (1, 1)}
    for number, text in enumerate(texts):
        for truth in range(3):
            path = write(tmp_path, line(1, text, choices=choices, answer_number=truth))
            assert score(path)["all"].choice_right == (texts[text][0] == truth)
            assert score(path, rule="own")["all"].choice_right == (texts[text][1] == truth)
    with pytest.raises(InputError, match="unknown rule 'mine': choose one of published, own"):
        score(path, rule="mine")


# What is in a reply; whether it is right and its score by the published rule, and by ours.
VERDICTS = [
    ('{"pred": "yes", "score": 5}', (True, 5), (True, 5)),
    ("{'pred': 'no', 'score': 0}", (False, 0), (False, 0)),
    ("{'pred': 'yes', 'score': 4.8}", (True, 4), (True, 4)),
    ("{'pred': 'yes', 'score': '4.8'}", (None, None), (True, 4)),
    ('```json\n{"pred": "Yes",\n "score": "3"}\n``` as asked', (True, 3), (True, 3)),
    ('{"score": 2, "pred": "NO", "why": "no"}', (False, 2), (False, 2)),
    ("{'pred': 'yes.', 'score': 4}", (True, 4), (None, None)),
    ("{'pred': 'yes, partly', 'score': 3}", (True, 3), (None, None)),
    ("{'pred': 'not sure', 'score': 2}", (False, 2), (None, None)),
    ('{"pred": "maybe", "score": 3}', (None, 3), (None, None)),
    ('{"pred": true, "score": 3}', (None, 3), (None, None)),
    ('{"pred": null, "score": 3}', (None, 3), (None, None)),
    ('{"pred": "yes", "score": 6}', (True, 6), (None, None)),
    ('{"pred": "yes", "score": -1}', (True, -1), (None, None)),
    ('{"pred": "yes", "score": Infinity}', (None, None), (None, None)),
    ('{"pred": "yes", "score": NaN}', (None, None), (None, None)),
    ('{"pred": "yes", "score": null}', (None, None), (None, None)),
    ('{"pred": "yes", "score": [5]}', (None, None), (None, None)),
    (f'{{"pred": "yes", "score": {10**400}}}', (None, None), (None, None)),
    ('{"pred": "yes", "score": 5, "reason": "it shows {red} and }"}', (True, 5), (True, 5)),
    ('{"verdict": {"pred": "yes", "score": 5}}', (True, 5), (True, 5)),
    ("<think>as {'pred': ..., 'score': ...}</think> {'pred': 'yes', 'score': 5}", (True, 5), (True, 5)),
    ("{'pred': 'no', 'score': 1}? No: {'pred': 'yes', 'score': 5}", (True, 5), (True, 5)),
    ("{'pred': 'no', 'score': 1} it is</think>{'pred': 'yes', 'score': 5}", (True, 5), (True, 5)),
]


@pytest.mark.parametrize(("text", "published", "own"), VERDICTS)
def test_verdicts(text, published, own, tmp_path):
    verdict = read_verdict(text)
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict
    assert rate(verdict, "published") == published and rate(verdict, "own") == own


def test_figures_by_both_rules(tmp_path):
    path = write(tmp_path, *(line(i, f"said {i}", truth="t") for i in range(len(VERDICTS))))

    def say(body):
        return VERDICTS[int(body["messages"][-1]["content"].split("said ")[1].split()[0])][0]

    with serving(say) as server:
        published = score(path, server.url)["all"].to_json()
        own = score(path, server.url, rule="own")["all"].to_json()
        assert len(server.requests) == len(VERDICTS), "the verdicts are kept as they are, whatever the rule"
    for told, column in ((published, 1), (own, 2)):
        rated = [of[column] for of in VERDICTS]
        right, wrong = (sum(is_right is wanted for is_right, _ in rated) for wanted in (True, False))
        judged = [points or 0 for is_right, points in rated if column == 1 or is_right is not None]
        assert told["open_ended"] == {
            "accuracy": right / (right + wrong),
            "right": right,
            "wrong": wrong,
            "mean_score": sum(judged) / len(judged),
        }
    assert published["unclear"] == sum(of[1][0] is None for of in VERDICTS) and published["not_judged"] == 0
    assert own["not_judged"] == sum(of[2][0] is None for of in VERDICTS) and own["unclear"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes, 5",
        "{}",
        "[1]",
        '{"pred": "yes"}',
        "{'pred': yes}",
        "{__import__('os')}",
        "{" * 10_000,
        "{" * 10_000 + "}" * 10_000,
        "<think>{'pred': 'yes', 'score': 5}",
        "{'pred': 'yes', 'score': 5}" + " " * 5000,
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
            "unclear": 0,
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
        assert cli.main(["score", str(path), "--judge", server.url]) == 1
        assert len(server.requests) == 4  # three attempts
        told, err = capsys.readouterr()
        assert told == "all: open-ended 100.0 % (1 of 1), mean score 5.00; 1 not judged\n"
        assert err == "not judged: the judge gave no verdict: 'no idea'\n"
        server.answer = graded
        assert cli.main(["score", str(path), "--judge", server.url, "--retry-errors"]) == 0
    assert capsys.readouterr().out == "all: open-ended 50.0 % (1 of 2), mean score 3.00\n"


def test_reasons_are_told_with_how_often_the_most_frequent_first(tmp_path, capsys):
    path = write(tmp_path, *(line(i, f"said {i}", truth="t") for i in range(7)))
    refusal = "Unsupported value: 'temperature' does not support 0 with this model"

    def answer(body):
        number = int(body["messages"][-1]["content"].split("said ")[1].split()[0])
        return (400, {"error": refusal if number < 3 else f"reason {number}"})

    with serving(answer) as server:
        assert cli.main(["score", str(path), "--judge", server.url, "--json"]) == 1
    told, err = capsys.readouterr()
    assert json.loads(told)["all"]["not_judged"] == 7 and len(err.splitlines()) == 4
    assert err.splitlines()[0] == f"not judged (3 answers): {server.url} says 400 {refusal}"
    assert err.splitlines()[-1] == "and 2 other reasons"


def test_a_judge_that_takes_the_newer_name_of_the_limit_alone_judges(tmp_path):
    def answer(body):
        return (400, {"error": "use 'max_completion_tokens'"}) if "max_tokens" in body else graded(body)

    with serving(answer) as server:
        assert score(write(tmp_path, line(1, "a", truth="a")), server.url)["all"].judged_right == 1


def test_verdicts_neither_yes_nor_no_are_told(tmp_path, capsys):
    with serving(lambda body: "{'pred': 'maybe', 'score': 3}") as server:
        path = str(write(tmp_path, line(1, "a", truth="a")))
        assert cli.main(["score", path, "--judge", server.url]) == 0
        assert capsys.readouterr().out == "all: 1 verdicts neither yes nor no\n"
        assert cli.main(["score", path, "--judge", server.url, "--rule", "own"]) == 1
    assert capsys.readouterr() == ("all: 1 not judged\n", "not judged: no verdict by our rule: 'maybe', score 3\n")


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
    told, err = capsys.readouterr()
    assert told == "all: 1 not judged\n" and "name one with --judge" in err
    assert not list(tmp_path.glob("*judged*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("", "no answers"),
        ('{"id": 1}\n', "no answers"),
        ("[]\n", "no answers of a batch in line 1"),
        (json.dumps(line(1)) + "\n" + json.dumps(line(2, answer=5)), "no answers of a batch in line 2"),
        (json.dumps(line(1, choices="ab", truth="a")), "no answers of a batch in line 1"),
        (json.dumps(line(None)), "no answers of a batch in line 1"),
    ],
)
def test_wrong_files_are_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    assert cli.main(["score", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sfllava-fast: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["sk-EXAMPLE\r", "sk-EXAMPLE\r\nX: y"])
def test_a_key_gets_into_no_file_and_no_message(key, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    path = write(tmp_path, line(1, "a", truth="a"))
    with serving(lambda body: (500, {"error": f"cannot read 'Bearer {key}'"})) as server:
        assert cli.main(["score", str(path), "--judge", server.url]) == (1 if key.strip().isprintable() else 2)
        for url in (server.url.replace("//", f"//user:{key.strip()}@"), f"{server.url}?key={key.strip()}"):
            assert cli.main(["score", str(path), "--judge", url]) == 2
    told, err = capfd.readouterr()
    assert "EXAMPLE" not in told + err and err.count("put its key into OPENAI_API_KEY") == 2
    for file in tmp_path.iterdir():
        assert b"EXAMPLE" not in file.read_bytes()


def test_verdicts_do_not_go_where_the_answers_are(tmp_path):
    path = write(tmp_path, line(1, "yes", truth="yes"))
    before = path.read_bytes()
    with serving(graded) as server, pytest.raises(InputError, match="has the answers: name another --out"):
        score(path, server.url, out=path, retry_changed=True)
    assert path.read_bytes() == before


def test_a_value_of_several_lines_is_one_line_of_the_table(tmp_path, capsys):
    odd = "a\nall: 100 %\x1b[2J"
    path = write(tmp_path, line(1, "A", choices=["x", "y"], truth="x", kind=odd))
    assert cli.main(["score", str(path), "--by", "kind"]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 2 and told.splitlines()[1].startswith("kind a all: 100 %\\x1b[2J: multiple")
