"""Accuracy of a batch's answers: multiple choice by an option rule, open-ended by a judge.

Options and verdicts are read by the published rules or by ours. As in the published evaluations, accuracy is over the
answered questions and the mean score over the judged ones; unanswered questions are counted apart. The published judge
is gpt-3.5-turbo-0125 with a prompt of its own: figures of different judges or prompts cannot be compared.
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
_REPLY_TOKENS = 1024  # room for judges that reason first
_BEST = 5
_MOST_BRACES = 8  # of either kind that are tried as the ends of a verdict
_LONGEST = 4096  # characters at the end of a reply that are searched
_MOST_REASONS = 3
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
    """Counts of answers.

    Attributes:
        choice_right, choice_wrong: Multiple choice.
        judged_right, judged_wrong: Open-ended.
        scores: Of the judged answers.
        unanswered: Questions that ended as errors.
        without_truth: Questions without a truth, or whose truth is not one of the choices.
        not_judged: Open-ended answers without a verdict.
        unclear: Verdicts that are neither yes nor no by the published rule.
        why: Reasons for `not_judged`.
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
        """Accuracies, mean score and counts of what was left out."""
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
    """Score a batch's output.

    Args:
        path: The output of `sfllava-fast batch`.
        judge: URL of an OpenAI-compatible server that grades open-ended answers; None leaves them out.
        judge_model: The judge's model; None takes the first that the server lists.
        out: File of the verdicts (default: PATH.judged.jsonl). The judge is asked for those that it lacks.
        workers: Number of concurrent requests to the judge.
        by: A field; figures are also given for each of its values.
        retry_errors: Ask again for verdicts that failed.
        retry_changed: Ask again for verdicts on another answer, question or truth. Without it they are refused.
        rule: "published" or "own", for options and verdicts.

    Returns:
        Figures of all lines under "all", and of each value of `by` under "FIELD VALUE".

    Raises:
        InputError: A file, the URL, the key or the rule cannot be used.
        BackendError: The judge cannot be reached.
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
            run(
                groups,
                out,
                {"judge": judge_model},
                make,
                workers,
                retry_errors=retry_errors,
                retry_changed=retry_changed,
                what="judged",
            )
            verdicts = {line["id"]: line for line in _read(out, "pred")}
    figures = {"all": Figures()}
    for line in lines:
        verdict = verdicts.get(line["id"])
        _count(figures["all"], line, verdict, rule)
        if by is not None:
            _count(figures.setdefault(f"{by} {line.get(by)}", Figures()), line, verdict, rule)
    return figures


def true_option(line: dict[str, Any]) -> int | None:
    """Index of the right choice of a line.

    It is `answer_number`, a number from 0 or a letter, if the line has one; else the choice that equals the truth, or
    whose letter the truth is.

    Returns:
        The index; None if that is not a choice.
    """
    texts = [str(choice).strip() for choice in line["choices"]]
    number, truth = line.get("answer_number"), line.get("truth")
    letters = string.ascii_uppercase[: len(texts)]
    if number in (None, ""):
        text = "" if truth is None else str(truth).strip()
        if text in texts:
            return texts.index(text)
        if text.lower() in map(str.lower, texts):
            return None  # ambiguous: a choice in other case, or a letter
    elif isinstance(number, (int, float)):
        # Tables with empty cells have floats: 1.0 for 1.
        return int(number) if number in range(len(texts)) and not isinstance(number, bool) else None
    else:
        text = str(number).strip()
        if text in map(str, range(len(texts))):
            return int(text)
    return letters.index(text.upper()) if len(text) == 1 and text.upper() in letters else None


class Judge:
    """Grades answers; `extra` of a question has its truth and the prediction."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __call__(self, question: Question) -> dict[str, Any]:
        prompt = _ASK.format(question=question.question, **question.extra)
        messages = [{"role": "system", "content": _RULES}, {"role": "user", "content": prompt}]
        return read_verdict(self.chat.reply(messages, _REPLY_TOKENS))


def make_judge(number: int, count: int, url: str, model: str | None) -> Judge:
    return Judge(Chat(url, model, timeout=_TIMEOUT))


def read_verdict(text: str) -> dict[str, Any]:
    """Find the verdict in a judge's reply: JSON or a Python dict, also within other words.

    Args:
        text: The reply. Of several verdicts the last counts, since a judge that reasons may draft some.

    Returns:
        {"pred": text, "score": number or text}, unchanged; `rate` interprets it.

    Raises:
        ServerError: The reply has no verdict.
    """
    reply = text.rpartition("</think>")[2].partition("<think>")[0][-_LONGEST:]
    ends = [i for i, letter in enumerate(reply) if letter == "}"][-_MOST_BRACES:]
    starts = [i for i, letter in enumerate(reply) if letter == "{"][-_MOST_BRACES:]
    for end in reversed(ends):
        for start in starts:
            found = _literal(reply[start : end + 1])
            if isinstance(found, dict) and "pred" in found and "score" in found:
                pred, score = found["pred"], found["score"]
                finite = isinstance(score, int) or (isinstance(score, float) and math.isfinite(score))
                return {"pred": pred if isinstance(pred, str) else "", "score": score if finite else str(score)[:20]}
    raise ServerError(f"the judge gave no verdict: {' '.join(text.split())[:200]!r}")


def _literal(text: str) -> Any:
    """The value of a JSON or Python literal; None for any other text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def rate(verdict: dict[str, Any], rule: str) -> tuple[bool | None, int | None]:
    """Interpret a verdict.

    Args:
        verdict: As `read_verdict` gives it.
        rule: "published": right if "yes" is anywhere in `pred`, else wrong if "no" is; any number is a score, cut to a
            whole number; without a score the verdict is unreadable. "own": "yes" or "no" alone, and a score of 0 to 5.

    Returns:
        Whether the answer is right, and its score; None for what the verdict does not contain.
    """
    pred, score = verdict["pred"].strip().lower(), verdict.get("score", "")
    try:
        points = int(float(score)) if rule == "own" else int(score)
    except (ValueError, TypeError, OverflowError):
        return None, None
    if rule == "own":
        return (pred == "yes", points) if pred in ("yes", "no") and 0 <= points <= _BEST else (None, None)
    right = True if "yes" in pred else False if "no" in pred else None
    return (right, points) if abs(points) < 10**9 else (None, None)


def table(figures: dict[str, Figures]) -> str:
    """The figures as text, one line for each."""
    lines = []
    for name, of in figures.items():
        values = of.to_json()
        scored = {"multiple choice": values["multiple_choice"], "open-ended": values["open_ended"]}
        parts = [f"{kind} {_percent(of_kind)}" for kind, of_kind in scored.items() if of_kind]
        left_out = {"unanswered": of.unanswered, "without truth": of.without_truth, "not judged": of.not_judged}
        left_out["verdicts neither yes nor no"] = of.unclear
        parts += [f"{count} {why}" for why, count in left_out.items() if count]
        lines.append(f"{one_line(name)}: {'; '.join(parts)}")
    return "\n".join(lines)


def reasons(figures: Figures) -> str:
    """Why answers were not judged, one line for each reason, the most frequent first."""
    lines = []
    for why, count in figures.why.most_common(_MOST_REASONS):
        several = f" ({count} answers)" if count > 1 else ""
        lines.append(f"not judged{several}: {one_line(why)}")
    if len(figures.why) > _MOST_REASONS:
        lines.append(f"and {len(figures.why) - _MOST_REASONS} other reasons")
    return "\n".join(lines)


def _percent(values: dict[str, Any]) -> str:
    mean = f", mean score {values['mean_score']:.2f}" if "mean_score" in values else ""
    return f"{100 * values['accuracy']:.1f} % ({values['right']} of {values['right'] + values['wrong']}){mean}"


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
    """The option of a line with choices.

    Batch picked it by our rule; the published rule may pick another from the same text, unless the question was asked
    without its choices.
    """
    if "option" in line and (rule == "own" or line.get("openly")):
        return line["option"]
    return pick_option(line["answer"], line["choices"], rule == "published")


def _as_question(line: dict[str, Any]) -> Group:
    extra = {"truth": line["truth"], "prediction": line["answer"]}
    return Group(line["video"], deque([Question(line["id"], line["video"], line["question"], None, extra)]))


def _read(path: Path, reply: str) -> list[dict[str, Any]]:
    """The lines of a batch's output or a judge's. reply: the field of the reply, "answer" or "pred"."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a line that is not JSON: run the batch again, which repairs it") from error
    wrong = [number for number, line in enumerate(lines, 1) if not _is_whole(line, reply)]
    if wrong or not lines:
        where = f" in line {wrong[0]}" if wrong else ""
        raise InputError(f"{path} has no answers of a batch{where}: name the file that `sfllava-fast batch` wrote")
    return lines


def _is_whole(line: Any, reply: str) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("id"), (str, int)):
        return False
    kinds = {"ok": bool, "video": str, "question": str}
    if "choices" in line:
        kinds["choices"] = list
    if line.get("ok") is True:
        kinds[reply] = str
    return all(isinstance(line.get(name), kind) for name, kind in kinds.items())
