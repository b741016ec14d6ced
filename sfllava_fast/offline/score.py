"""How many answers are right: multiple choice by the published option rule, open-ended by a judge.

Accuracy is over what was answered and the mean score over what was judged, as the published evaluations have it: a
question without an answer is counted apart. The published judge is gpt-3.5-turbo-0125 under a prompt of its own;
figures of different judges, or prompts, do not compare.
"""

from __future__ import annotations

import ast
import json
import re
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, ServerError
from ..prompts import pick_option
from .chat import Chat
from .questions import Group, Id, Question
from .run import run

DEFAULT_WORKERS = 4
_TIMEOUT = 120.0
_REPLY_TOKENS = 64
_BEST = 5
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
    """Counts of answers, and of what could not be scored and why."""

    choice_right: int = 0
    choice_wrong: int = 0
    judged_right: int = 0
    judged_wrong: int = 0
    scores: list[int] = field(default_factory=list)
    unanswered: int = 0
    without_truth: int = 0
    not_judged: int = 0

    def to_json(self) -> dict[str, Any]:
        left_out = {name: getattr(self, name) for name in ("unanswered", "without_truth", "not_judged")}
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
) -> dict[str, Figures]:
    """Figures of a batch's output, under "all" and, with `by`, under each value of that field.

    judge: URL of an OpenAI-compatible server that says yes or no to open-ended answers; its verdicts are kept in `out`
    (default: beside the output, .judged.jsonl) and the judge is asked for those that are missing. retry_errors,
    retry_changed: also for those that failed, and those on another answer, question or truth, which are refused
    without it.
    Raises InputError or BackendError.
    """
    lines = _read_answers(path)
    verdicts: dict[Id, dict[str, Any]] = {}
    if judge is not None:
        out = out or path.with_suffix(".judged.jsonl")
        groups = [_as_question(line) for line in lines if line["ok"] and "choices" not in line and "truth" in line]
        if groups:
            make = partial(make_judge, url=judge, model=judge_model)
            again = {"retry_errors": retry_errors, "retry_changed": retry_changed}
            run(groups, out, {"judge": judge_model}, make, workers, **again, what="judged")
            verdicts = {line["id"]: line for line in _read_answers(out)}
    figures = {"all": Figures()}
    for line in lines:
        _count(figures["all"], line, verdicts.get(line["id"]))
        if by is not None:
            _count(figures.setdefault(f"{by} {line.get(by)}", Figures()), line, verdicts.get(line["id"]))
    return figures


def true_option(line: dict[str, Any]) -> int | None:
    """Index of the right choice: `answer_number` where the file has it, else where the truth is among the choices."""
    if line.get("answer_number") is not None:
        return line["answer_number"]
    truth, choices = line.get("truth"), line["choices"]
    return choices.index(truth) if truth in choices else None


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
    """{"pred": "yes" or "no", "score": 0 to 5} of a judge's reply: JSON or a Python dict, also within other words.

    A fraction of a score is cut off, as published. Raises ServerError for anything else.
    """
    found = re.search(r"\{.*?\}", text, re.DOTALL)
    for parse in (json.loads, ast.literal_eval):
        try:
            verdict = parse(found.group()) if found else {}
            pred, points = str(verdict["pred"]).strip().lower(), int(float(verdict["score"]))
        except (ValueError, SyntaxError, KeyError, TypeError, OverflowError):
            continue
        if pred in ("yes", "no") and 0 <= points <= _BEST:
            return {"pred": pred, "score": points}
    raise ServerError(f"the judge gave no verdict: {' '.join(text.split())[:200]!r}")


def table(figures: dict[str, Figures]) -> str:
    """The figures, a line each."""
    lines = []
    for name, of in figures.items():
        told = of.to_json()
        scored = {"multiple choice": told["multiple_choice"], "open-ended": told["open_ended"]}
        parts = [f"{kind} {_percent(of_kind)}" for kind, of_kind in scored.items() if of_kind]
        left_out = {"unanswered": of.unanswered, "without truth": of.without_truth, "not judged": of.not_judged}
        parts += [f"{count} {why}" for why, count in left_out.items() if count]
        lines.append(f"{name}: {'; '.join(parts)}")
    return "\n".join(lines)


def _percent(told: dict[str, Any]) -> str:
    mean = f", mean score {told['mean_score']:.2f}" if "mean_score" in told else ""
    return f"{100 * told['accuracy']:.1f} % ({told['right']} of {told['right'] + told['wrong']}){mean}"


def _accuracy(right: int, wrong: int) -> dict[str, Any] | None:
    return {"accuracy": right / (right + wrong), "right": right, "wrong": wrong} if right + wrong else None


def _count(figures: Figures, line: dict[str, Any], verdict: dict[str, Any] | None) -> None:
    if not line["ok"]:
        figures.unanswered += 1
    elif "choices" in line:
        truth = true_option(line)
        if truth is None:
            figures.without_truth += 1
        elif pick_option(line["answer"], line["choices"]) == truth:
            figures.choice_right += 1
        else:
            figures.choice_wrong += 1
    elif "truth" not in line:
        figures.without_truth += 1
    elif verdict is None or not verdict["ok"]:
        figures.not_judged += 1
    else:
        figures.judged_right += verdict["pred"] == "yes"
        figures.judged_wrong += verdict["pred"] == "no"
        figures.scores.append(verdict["score"])


def _as_question(line: dict[str, Any]) -> Group:
    extra = {"truth": line["truth"], "prediction": line["answer"]}
    return Group(line["video"], deque([Question(line["id"], line["video"], line["question"], None, extra)]))


def _read_answers(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} has a line that is not JSON: run the batch again, which repairs it") from error
    if not lines or not all(isinstance(line, dict) and "ok" in line for line in lines):
        raise InputError(f"{path} has no answers of a batch: name the file that `sfllava-fast batch --out` wrote")
    return lines
