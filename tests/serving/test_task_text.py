"""The question and the options in the texts of lmms-eval's video benchmarks."""

import pytest

from sfllava_fast.serving.task_text import read_task_text

LETTER = "Answer with the option's letter from the given choices directly."
FIVE = ["roll the handle", "tap their feet", "strum the string", "hit with sticks", "pat with hand"]


MARKS = ["{}. ", "{}) ", "({}) ", "{}: ", "{}.", "{}\uff0e", "\uff08{}\uff09", "{}\uff1a ", "{}\u3001"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("instruction", ["", LETTER, f"{LETTER}\nOnly the letter."])
@pytest.mark.parametrize("letters", ["ABCDE", "abcde"])
def test_options_are_read_whatever_marks_their_letters(mark, instruction, letters):
    lines = ["how do the two man play", *(mark.format(c) + text for c, text in zip(letters, FIVE)), instruction]
    assert read_task_text("\n".join(lines)) == ("how do the two man play", FIVE, instruction)


def test_a_heading_of_the_options_is_no_part_of_the_question():
    text = f"Choose.\nWhat is it?\n\nOptions:\nA. a cat\n\nB. a dog\n\n{LETTER}\n"
    assert read_task_text(text) == ("Choose.\nWhat is it?", ["a cat", "a dog"], LETTER)
    assert read_task_text("Options\nA. a cat\nB. a dog")[0] == "Options", "a question is never empty"


SELECT = "Select the best answer to the following multiple-choice question. Respond with only the letter."
ABOUT = "Please answer the question about the video:"


@pytest.mark.parametrize("leading", [[SELECT], [ABOUT], [SELECT, ABOUT]])
@pytest.mark.parametrize("label", ["", "Question: "])
def test_an_instruction_in_front_is_no_part_of_the_question(leading, label):
    lines = [*leading, f"{label}What does he do?", "A. He sits.", "B. He runs.", "The best answer is:"]
    told = "\n".join([*leading, "The best answer is:"])
    assert read_task_text("\n".join(lines)) == ("What does he do?", ["He sits.", "He runs."], told)
    lines = [*leading, f"{label}What does he do?\n{LETTER}"]
    assert read_task_text("\n".join(lines)) == ("What does he do?", None, "\n".join([*leading, LETTER]))


@pytest.mark.parametrize(
    "question",
    ["Choose.\nWhat is it?", "Choose the right option?\nHow?", "Answer the phone.\nWho?", f"Which option?\n{SELECT}"],
)
def test_what_only_begins_like_an_instruction_is_the_question(question):
    assert read_task_text(f"{question}\nA. x\nB. y").question == question
    assert read_task_text(f"{SELECT}\nA. x\nB. y").question == SELECT, "a question is never empty"


def test_options_of_several_lines():
    text = f"What?\nA. He sits\non a chair.\nB.\nHe runs.\n\nC. He\nDOES\nboth,\nand then\nstops\n{LETTER}"
    rest = f"DOES\nboth,\nand then\nstops\n{LETTER}"
    assert read_task_text(text) == ("What?", ["He sits on a chair.", "He runs.", "He"], rest)
    text = f"What?\nA. He sits.\nB. He runs\nacross the road.\n{LETTER}"
    assert read_task_text(text) == ("What?", ["He sits.", "He runs across the road."], LETTER)


def test_the_last_of_two_lists_has_the_options():
    events = "Which order is right?\nA. he sits\nB. he runs\nC. he falls"
    text = f"{events}\nOptions:\n(A) A, B, C\n(B) C, B, A\n{LETTER}"
    assert read_task_text(text) == (events, ["A, B, C", "C, B, A"], LETTER)
    text = f"{events}\nIn which order?\nA. A, B, C\nB. C, B, A\nC. B, A, C\nD. none\n{LETTER}"
    assert read_task_text(text) == (f"{events}\nIn which order?", ["A, B, C", "C, B, A", "B, A, C", "none"], LETTER)


def test_an_option_may_be_empty_but_not_all():
    assert read_task_text("What?\nA. \nB. x\nC.") == ("What?", ["", "x", ""], "")
    assert read_task_text("What?\nA.\nB.").options is None


def test_labels_that_the_prompts_have_are_left_out():
    text = "Question:What is it?\nOption:\n(A) a cat\n(B) a dog\n"
    assert read_task_text(text) == ("What is it?", ["a cat", "a dog"], "")
    assert read_task_text("question : What is it?") == ("What is it?", None, "")
    assert read_task_text("Which question: A or B?").question == "Which question: A or B?"


@pytest.mark.parametrize(
    "text",
    [
        "Who is A. Einstein?",
        "What follows?\nA. one alone",
        "What follows?\nB. two\nC. three",
        "What follows?\nA. one\nC. three",
        "A. one\nB. two",
        "What is written: A) or B)?",
        "What follows?\nA. one\nB) two",
        "What follows?\nA. one\nb. two",
    ],
)
def test_what_lists_no_options_is_asked_whole(text):
    assert read_task_text(text) == (text, None, "")


@pytest.mark.parametrize(
    "question, instruction",
    [
        ("Is the athlete wearing trousers?", " Answer the question using a single word or phrase."),
        ("what is the man doing", "\nAnswer a question using a short phrase or sentence."),
        ("Describe the room.", " Please answer briefly"),
        ("What is the answer?", ""),
        ("Does she answer the phone?", ""),
        ("Answer the phone: who does that?", ""),
        ("Answer in one word.", ""),
    ],
)
def test_the_closing_instruction_is_told_from_the_question(question, instruction):
    assert read_task_text(question + instruction) == (question, None, instruction.strip())
