"""How many answers are right: multiple choice by an option rule, open-ended by a judge.

Options and verdicts are read by the published rules, or by ours. Accuracy is over what was answered and the mean score
over what was judged, as the published evaluations have it: a question without an answer is counted apart. The published
judge is gpt-3.5-turbo-0125 under a prompt of its own; figures of different judges, or prompts, do not compare.
"""

from __future__ import annotations

import ast
import json
import math
import string
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, ServerError
from ..model.prompts import pick_option
from ..terminal import one_line
from .chat import Chat, check_access
from .questions import Group, Id, Question
from .run import run

DEFAULT_WORKERS = 4
RULES = ("published", "own")
_TIMEOUT = 120.0
_REPLY_TOKENS = 1024  # some judges think first
_BEST = 5
_BRACES = 8
_LONGEST = 4096  # characters of a reply's end that are looked at
_TOLD = 3
_RULES = (
    "You grade answers to questions about videos. You get a question, its reference answer and the answer of a model. "
    "An answer is correct where it means what the reference means: other words for it count, more detail does no harm, "
    "a contradiction does."
)
_ASK = (
    "Question: {question}\nReference answer: {truth}\nAnswer of the model: {prediction}\n\n"
    'Reply with one JSON object and nothing else: {{"pred": "yes" or "no", whether the answer is correct, '
    '"score": a whole number from 0, unrelated, to 5, the same meaning}}'
)


@dataclass
class Figures:
    """Counts of answers, and of what could not be scored and why.

    unclear: verdicts that are neither right nor wrong by the published rule. without_truth: no truth, or one that is
    none of the choices. why: reasons of what was not judged.
    """

    choice_right: int = 0
    choice_wrong: int = 0
    judged_right: int = 0
    judged_wrong: int = 0
    scores: list[int] = field(default_factory=list)
    unanswered: int = 0
    without_truth: int = 0
    not_judged: int = 0
    unclear: int = 0
    why: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        left_out = {name: getattr(self, name) for name in ("unanswered", "without_truth", "not_judged", "unclear")}
        choice = _accuracy(self.choice_right, self.choice_wrong)
        judged = _accuracy(self.judged_right, self.judged_wrong)
        if judged:
            judged["mean_score"] = sum(self.scores) / len(self.scores)
        return {"multiple_choice": choice, "open_ended": judged, **left_out}


def score(
    path: Path,
    judge: str | None = None,
    judge_model: str | None = None,
    out: Path | None = None,
    workers: int = DEFAULT_WORKERS,
    by: str | None = None,
    retry_errors: bool = False,
    retry_changed: bool = False,
    rule: str = "published",
) -> dict[str, Figures]:
    """Figures of a batch's output, under "all" and, with `by`, under each value of that field.

    judge: URL of an OpenAI-compatible server that says yes or no to open-ended answers; its verdicts are kept in `out`
    (default: beside the output, .judged.jsonl) and the judge is asked for those that are missing. retry_errors,
    retry_changed: also for those that failed, and those on another answer, question or truth, which are refused
    without it. rule: "published" or "own", for options and verdicts.
    Raises InputError, also for a URL or key that cannot be used, or BackendError.
    """
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    lines = _read(path, "answer")
    verdicts: dict[Id, dict[str, Any]] = {}
    if judge is not None:
        check_access(judge)
        out = out or path.with_suffix(".judged.jsonl")
        if out.exists() and out.samefile(path):
            raise InputError(f"{out} has the answers: name another --out for the verdicts")
        groups = [_as_question(line) for line in lines if line["ok"] and "choices" not in line and "truth" in line]
        if groups:
            judge_model = judge_model or Chat(judge, timeout=_TIMEOUT).model
            make = partial(make_judge, url=judge, model=judge_model)
            again = {"retry_errors": retry_errors, "retry_changed": retry_changed}
            run(groups, out, {"judge": judge_model}, make, workers, **again, what="judged")
            verdicts = {line["id"]: line for line in _read(out, "pred")}
    figures = {"all": Figures()}
    for line in lines:
        of = [figures["all"]]
        if by is not None:
            of.append(figures.setdefault(f"{by} {line.get(by)}", Figures()))
        for one in of:
            _count(one, line, verdicts.get(line["id"]), rule)
    return figures


def true_option(line: dict[str, Any]) -> int | None:
    """Index of the right choice: `answer_number` where the file has it, a number from 0 on or a letter; else where the
    truth is among the choices, or the choice whose letter it is. None where that is no choice."""
    texts = [str(choice).strip() for choice in line["choices"]]
    number, truth = line.get("answer_number"), line.get("truth")
    letters = string.ascii_uppercase[: len(texts)]
    if number in (None, ""):
        text = "" if truth is None else str(truth).strip()
        if text in texts:
            return texts.index(text)
        if text.lower() in map(str.lower, texts):
            return None  # it may be that choice as well as a letter
    elif isinstance(number, (int, float)):
        # A table with gaps has 1.0 for 1.
        return int(number) if number in range(len(texts)) and not isinstance(number, bool) else None
    else:
        text = str(number).strip()
        if text in map(str, range(len(texts))):
            return int(text)
    return letters.index(text.upper()) if len(text) == 1 and text.upper() in letters else None


class Judge:
    """Grades answers: each question holds its truth and the answer of the model in `extra`."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __call__(self, question: Question) -> dict[str, Any]:
        asked = _ASK.format(question=question.question, **question.extra)
        messages = [{"role": "system", "content": _RULES}, {"role": "user", "content": asked}]
        return read_verdict(self.chat.reply(messages, _REPLY_TOKENS))


def make_judge(number: int, count: int, url: str, model: str | None) -> Judge:
    return Judge(Chat(url, model, timeout=_TIMEOUT))


def read_verdict(text: str) -> dict[str, Any]:
    """The verdict {"pred": text, "score": number or text} in a judge's reply, as it stands there: JSON or a Python
    dict, also within other words; the last of several, as a judge that thinks makes drafts. `rate` says what it means.

    Raises ServerError where there is none.
    """
    said = text.rpartition("</think>")[2].partition("<think>")[0][-_LONGEST:]
    ends = [i for i, letter in enumerate(said) if letter == "}"][-_BRACES:]
    starts = [i for i, letter in enumerate(said) if letter == "{"][-_BRACES:]
    for end in reversed(ends):
        for start in starts:
            found = _literal(said[start : end + 1])
            if isinstance(found, dict) and "pred" in found and "score" in found:
                pred, score = found["pred"], found["score"]
                finite = isinstance(score, int) or (isinstance(score, float) and math.isfinite(score))
                return {"pred": pred if isinstance(pred, str) else "", "score": score if finite else str(score)[:20]}
    raise ServerError(f"the judge gave no verdict: {' '.join(text.split())[:200]!r}")


def _literal(text: str) -> Any:
    """What a text is in JSON or in Python; None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def rate(verdict: dict[str, Any], rule: str) -> tuple[bool | None, int | None]:
    """Whether a verdict finds an answer right, and its score; None for what it does not say.

    Published: right where "yes" is anywhere in `pred`, wrong where else "no" is; any whole number is a score, a
    fraction is cut off, and without a score the rest is not read. Ours: yes or no alone, and a score from 0 to 5.
    """
    pred, score = verdict["pred"].strip().lower(), verdict.get("score")
    try:
        points = int(float(score)) if rule == "own" else int(score)
    except (ValueError, TypeError, OverflowError):
        return None, None
    if rule == "own":
        return (pred == "yes", points) if pred in ("yes", "no") and 0 <= points <= _BEST else (None, None)
    right = True if "yes" in pred else False if "no" in pred else None
    return (right, points) if abs(points) < 10**9 else (None, None)


def table(figures: dict[str, Figures]) -> str:
    """The figures, a line each."""
    lines = []
    for name, of in figures.items():
        told = of.to_json()
        scored = {"multiple choice": told["multiple_choice"], "open-ended": told["open_ended"]}
        parts = [f"{kind} {_percent(of_kind)}" for kind, of_kind in scored.items() if of_kind]
        left_out = {"unanswered": of.unanswered, "without truth": of.without_truth, "not judged": of.not_judged}
        left_out["verdicts neither yes nor no"] = of.unclear
        parts += [f"{count} {why}" for why, count in left_out.items() if count]
        lines.append(f"{one_line(name)}: {'; '.join(parts)}")
    return "\n".join(lines)


def reasons(figures: Figures) -> str:
    """Why answers were not judged, a line each, the most frequent first."""
    told = ((one_line(why), f" ({count} answers)" if count > 1 else "") for why, count in figures.why.most_common())
    lines = [f"not judged{often}: {why}" for why, often in told]
    return "\n".join(lines[:_TOLD] + [f"and {len(lines) - _TOLD} other reasons"] * (len(lines) > _TOLD))


def _percent(told: dict[str, Any]) -> str:
    mean = f", mean score {told['mean_score']:.2f}" if "mean_score" in told else ""
    return f"{100 * told['accuracy']:.1f} % ({told['right']} of {told['right'] + told['wrong']}){mean}"


def _accuracy(right: int, wrong: int) -> dict[str, Any] | None:
    return {"accuracy": right / (right + wrong), "right": right, "wrong": wrong} if right + wrong else None


def _count(figures: Figures, line: dict[str, Any], verdict: dict[str, Any] | None, rule: str) -> None:
    if not line["ok"]:
        figures.unanswered += 1
    elif "choices" in line:
        truth = true_option(line)
        if truth is None:
            figures.without_truth += 1
        elif _picked(line, rule) == truth:
            figures.choice_right += 1
        else:
            figures.choice_wrong += 1
    elif "truth" not in line:
        figures.without_truth += 1
    else:
        _count_verdict(figures, verdict, rule)


def _count_verdict(figures: Figures, verdict: dict[str, Any] | None, rule: str) -> None:
    if verdict is None or not verdict["ok"]:
        figures.not_judged += 1
        figures.why[str(verdict.get("error")) if verdict else "there is no judge, name one with --judge"] += 1
        return
    right, points = rate(verdict, rule)
    if rule == "own" and right is None:
        figures.not_judged += 1
        figures.why[f"no verdict by our rule: {verdict['pred'][:40]!r}, score {verdict.get('score')}"] += 1
        return
    figures.judged_right += right is True
    figures.judged_wrong += right is False
    figures.unclear += right is None
    figures.scores.append(points or 0)  # as published: one that cannot be read counts in the mean


def _picked(line: dict[str, Any], rule: str) -> int | None:
    """The option of a line with choices: by the rule, or for a question that was asked openly what batch picked."""
    return line["option"] if line.get("openly") else pick_option(line["answer"], line["choices"], rule == "published")


def _as_question(line: dict[str, Any]) -> Group:
    extra = {"truth": line["truth"], "prediction": line["answer"]}
    return Group(line["video"], deque([Question(line["id"], line["video"], line["question"], None, extra)]))


def _read(path: Path, reply: str) -> list[dict[str, Any]]:
    """The lines of a batch, whose replies are "answer", or of its judge, whose are "pred"."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a line that is not JSON: run the batch again, which repairs it") from error
    wrong = [number for number, line in enumerate(lines, 1) if not _is_whole(line, reply)]
    if wrong or not lines:
        where = f" in line {wrong[0]}" if wrong else ""
        told = f"{path} has no answers of a batch{where}"
        raise InputError(f"{told}: name the file that `sfllava-fast batch --out` wrote")
    return lines


def _is_whole(line: Any, reply: str) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("id"), (str, int)):
        return False
    texts = ("video", "question", *[reply] * (line.get("ok") is True))
    kinds = {"ok": bool, "choices": list, **dict.fromkeys(texts, str)}
    return all(isinstance(line.get(name, [] if name == "choices" else None), kind) for name, kind in kinds.items())
