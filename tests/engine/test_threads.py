"""Threads that ask one model: in one session, in sessions of it, and within an answer."""

import threading

import pytest
from tiny_engine import QUESTION, Clip

from sfllava_fast.engine import exclusive
from sfllava_fast.engine.exclusive import Exclusive
from sfllava_fast.errors import InputError

ASK = {"max_new_tokens": 6}
OTHER = "Where does it go, and why so slowly?"
REDUCTIONS = [None, "prune:0.5", "mixture:0.5:norm", "prune:0.5:question"]


def in_the_middle(ask, meanwhile):
    """The answer of `ask`, in the middle of whose first token a thread begins `meanwhile`; and whether that ended
    before the answer did."""
    thread, ended = threading.Thread(target=meanwhile), []

    def on_token(_):
        if not thread.ident:
            thread.start()
            thread.join(0.3)  # it would take milliseconds, if it did not wait
            ended.append(not thread.is_alive())

    answer = ask(on_token)
    thread.join()
    return answer.token_ids, ended == [True]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shared", [True, False], ids=["one session", "two sessions"])
def test_questions_of_other_threads_wait(load, reduction, shared):
    model = load(text={"num_hidden_layers": 3}, options={"reduction": reduction})
    alone = [model.answer(Clip(), question, frames=9, **ASK).token_ids for question in (QUESTION, OTHER)]
    assert alone[0] != alone[1]
    sessions = [model.open(Clip(), frames=9) for _ in range(2)]
    other, answers = sessions[0 if shared else 1], []
    first, overtaken = in_the_middle(
        lambda on_token: sessions[0].ask(QUESTION, on_token=on_token, **ASK),
        lambda: answers.append(other.ask(OTHER, **ASK).token_ids),
    )
    assert [first, *answers] == alone and not overtaken


@pytest.mark.parametrize("mode", ["slowfast", "memory", "append"])
@pytest.mark.parametrize("use", ["push", "ask", "close"])
def test_streams_of_other_threads_wait(load, mode, use):
    def stream():
        made = model.open_stream(mode, frames=8, layout="fast_only" if mode == "append" else None)
        made.push(Clip(8).pictures)
        return made

    model, ask = load(), {"ask": lambda: session.ask(OTHER, **ASK), "close": lambda: session.close()}
    expected = stream().ask(QUESTION, **ASK).token_ids
    session = stream()
    first, overtaken = in_the_middle(
        lambda on_token: session.ask(QUESTION, on_token=on_token, **ASK),
        ask.get(use, lambda: session.push(Clip(20).pictures[8:])),
    )
    assert first == expected and not overtaken
    assert session.closed if use == "close" else session.seen == (20 if use == "push" else 8)


def test_a_batch_waits_and_layouts_share_a_model(load):
    model = load()
    session, other = model.open(Clip(), frames=9), model.with_layout("fast_only")
    expected, answers = model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids, []
    for meanwhile in (
        lambda: answers.append(model.answer_batch([(Clip(), OTHER)], frames=9, **ASK)),
        lambda: answers.append(other.answer(Clip(), OTHER, frames=9, **ASK)),
    ):
        first, overtaken = in_the_middle(lambda on_token: session.ask(QUESTION, on_token=on_token, **ASK), meanwhile)
        assert first == expected and not overtaken
    assert len(answers) == 2


def test_an_answer_within_an_answer_is_refused(load):
    model = load()
    session, stream = model.open(Clip(), frames=9), model.open_stream("append", frames=8, layout="fast_only")
    stream.push(Clip(8).pictures)
    expected = session.ask(QUESTION, **ASK).token_ids
    refused = []

    def within(_):
        for use in (lambda: session.ask(OTHER), lambda: stream.push(Clip().pictures), lambda: model.answer_batch([])):
            with pytest.raises(InputError, match="in the middle of an answer") as raised:
                use()
            refused.append(str(raised.value))

    assert session.ask(QUESTION, on_token=within, **ASK).token_ids == expected
    assert len(set(refused)) == 1 and "\n" not in refused[0]
    assert session.ask(QUESTION, **ASK).token_ids == expected and stream.seen == 8


def test_an_interrupt_leaves_the_model_to_others(load):
    model = load()
    session = model.open(Clip(), frames=9)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION, on_token=interrupt, **ASK)
    thread = threading.Thread(target=lambda: session.ask(QUESTION, **ASK), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and session.ask(OTHER, **ASK).text is not None


def test_models_that_wait_for_each_other_are_an_error(load, deadline):
    """Of two threads, each in an answer of one model, in which it asks the other model: one is refused, all end."""
    models = [load(), load(seed=1)]
    expected = [model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids for model in models]
    both, answers, errors = threading.Barrier(2, timeout=60), [None, None], []

    def ask(number):
        session, other, asked = models[number].open(Clip(), frames=9), models[1 - number], []

        def on_token(_):
            if asked:
                return
            asked.append(both.wait())  # now each thread has its model
            try:
                other.answer(Clip(), OTHER, frames=9, **ASK)
            except InputError as error:
                errors.append(str(error))

        answers[number] = session.ask(QUESTION, on_token=on_token, **ASK).token_ids

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert answers == expected and len(errors) == 1
    assert "wait for each other's model" in errors[0] and "\n" not in errors[0]


def test_three_models_in_a_circle_are_an_error_and_a_chain_is_none(deadline):
    """Locks alone: each thread has one and takes the next thread's; without the last one nothing is refused."""
    for last in (True, False):
        locks, ready, errors = [Exclusive() for _ in range(4)], threading.Barrier(3, timeout=60), []

        def take(number):
            with locks[number].taken():
                ready.wait()
                try:
                    with locks[(number + 1) % 3 if last else number + 1].taken(), locks[number].taken():
                        pass
                except InputError as error:
                    errors.append(str(error))

        threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads) and len(errors) == last
        assert not any(lock._owner for lock in locks) and not exclusive._waiting
