"""The question and the options in the texts of lmms-eval's video benchmarks."""

import pytest

from sfllava_fast.serving.task_text import read_task_text

LETTER = "Answer with the option's letter from the given choices directly."
FIVE = ["roll the handle", "tap their feet", "strum the string", "hit with sticks", "pat with hand"]


@pytest.mark.parametrize("mark", ["{}. ", "{}) ", "({}) ", "{}: ", "{}."])
@pytest.mark.parametrize("instruction", ["", LETTER, f"{LETTER}\nOnly the letter."])
def test_options_are_read_whatever_marks_their_letters(mark, instruction):
    lines = ["how do the two man play", *(mark.format(c) + text for c, text in zip("ABCDE", FIVE)), instruction]
    assert read_task_text("\n".join(lines)) == ("how do the two man play", FIVE, instruction)


def test_a_heading_of_the_options_is_no_part_of_the_question():
    text = f"Choose.\nWhat is it?\n\nOptions:\nA. a cat\n\nB. a dog\n\n{LETTER}\n"
    assert read_task_text(text) == ("Choose.\nWhat is it?", ["a cat", "a dog"], LETTER)
    assert read_task_text("Options\nA. a cat\nB. a dog")[0] == "Options", "a question is never empty"


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
