"""The journal of a batch: one line a question whatever cuts it off, one writer, the settings it was begun with."""

import json
import os
import resource
import subprocess
import sys
from collections import deque

import pytest

from sfllava_fast.batch.journal import Journal
from sfllava_fast.batch.questions import Group, Question
from sfllava_fast.batch.scheduler import Scheduler
from sfllava_fast.errors import InputError

SETTINGS = {"model": "m", "frames": 8}
IDS = [1, "1", "zwei \u00fc", "\ud800", 5]


def line(key, ok=True, **more):
    return {"id": key, "video": f"v{key}", "ok": ok, **more}


def read(path):
    return [json.loads(text) for text in path.read_bytes().splitlines()]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def write(out, ids=IDS, settings=SETTINGS):
    with Journal(out, settings) as journal:
        journal.begin()
        for key in ids:
            if key not in journal.done:
                journal.start(key)
                journal.finish(line(key))


def test_lines_are_whole_when_finish_returns(out):
    with Journal(out, SETTINGS) as journal:
        journal.begin()
        for count, key in enumerate(IDS, 1):
            journal.start(key)
            journal.finish(line(key))
            assert read(out) == [line(k) for k in IDS[:count]]
        assert journal.done == dict.fromkeys(IDS, True) and journal.answered == 5
    assert Journal(out, SETTINGS).attempts == dict.fromkeys(IDS, 1)


def test_cut_anywhere_it_is_resumed_complete_and_without_doubles(out, tmp_path):
    write(out)
    whole, state = out.read_bytes(), (tmp_path / "answers.jsonl.state").read_bytes()
    for end in range(len(whole) + 1):
        out.write_bytes(whole[:end])
        write(out)
        assert sorted(read(out), key=lambda row: str(row)) == sorted(map(line, IDS), key=lambda row: str(row)), end
    for end in range(len(state) + 1):
        (tmp_path / "answers.jsonl.state").write_bytes(state[:end])
        out.write_bytes(whole[: len(whole) // 2])
        write(out)
        assert sorted(map(str, read(out))) == sorted(map(str, map(line, IDS))), end


def test_a_tail_of_zeros_is_taken_off(out):
    write(out)
    whole = out.read_bytes()
    for tail in (b"\0" * 50, whole[:20] + b"\0" * 9):
        out.write_bytes(whole + tail)
        write(out)
        assert out.read_bytes() == whole


def test_attempts_are_known_to_the_next_run(out):
    for _ in range(2):
        with Journal(out, SETTINGS) as journal:
            journal.begin()
            journal.start("a")
            journal.start("b")
            journal.withdraw("b")
    assert Journal(out, SETTINGS).attempts == {"a": 2, "b": 0}


def test_errors_are_forgotten_on_request(out):
    with Journal(out, SETTINGS) as journal:
        journal.begin()
        for key in ("a", "b", "c"):
            journal.start(key)
            journal.finish(line(key, ok=key == "b", error="bad", quarantined=key == "a"))
    with Journal(out, SETTINGS) as journal:
        assert journal.done == {"a": False, "b": True, "c": False}
        assert journal.errors["a"] == {"video": "va", "error": "bad", "quarantined": True}
        assert journal.answered_videos == {"vb"}
        journal.begin(retry={"a"})
        assert journal.done == {"b": True, "c": False} and journal.attempts["a"] == 0
        assert [row["id"] for row in read(out)] == ["b", "c"]
        journal.finish(line("a"))
    assert [row["id"] for row in read(out)] == ["b", "c", "a"]
    assert not list(out.parent.glob("*.part"))


LOCK = "import sys; from pathlib import Path; from sfllava_fast.batch.journal import Journal\n"
HOLD = LOCK + "j = Journal(Path(sys.argv[1]), {}); print('held', flush=True); sys.stdin.read()"


def test_one_writer_at_a_time_until_it_is_killed(out):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="answers.jsonl is being written by another batch"):
            Journal(out, {})
    finally:
        holder.kill()
        holder.communicate()
    Journal(out, {}).close()


def test_nothing_is_left_of_a_run_that_did_not_begin(out):
    with Journal(out, SETTINGS):
        pass
    assert not list(out.parent.iterdir())


def test_a_file_that_is_removed_while_we_wait_for_its_lock_is_not_ours(out, monkeypatch):
    import fcntl

    real, states = fcntl.flock, []

    def flock(file, how):
        if not states:  # another batch ends between our opening and our locking
            (out.parent / "answers.jsonl.state").unlink()
        states.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Journal(out, SETTINGS) as journal:
        journal.begin()
        assert len(states) == 2 and (out.parent / "answers.jsonl.state").stat().st_size > 0


def test_other_settings_are_refused_once_there_are_answers(out):
    with Journal(out, SETTINGS | {"frames": 4}) as journal:
        journal.begin()
        journal.start("a")
    write(out)  # nothing had been answered
    assert read(out.parent / "answers.jsonl.state")[0] == {"settings": SETTINGS}
    with pytest.raises(InputError, match="was begun with frames 8, not 4: use the same"):
        Journal(out, SETTINGS | {"frames": 4})
    with pytest.raises(InputError, match="was begun with frames 8, not None: use the same"):
        Journal(out, {"model": "m"})
    write(out)


def test_removing_the_output_begins_again(out):
    write(out)
    out.unlink()
    with Journal(out, SETTINGS | {"frames": 4}) as journal:
        assert journal.attempts == {} and journal.done == {}


def test_links_to_the_output_are_the_output(out, tmp_path):
    write(out, IDS[:2])
    (tmp_path / "folder").mkdir()
    link, dangling = tmp_path / "folder" / "link.jsonl", tmp_path / "folder" / "new.jsonl"
    link.symlink_to(out)
    dangling.symlink_to("../made.jsonl")
    write(link)
    assert [row["id"] for row in read(out)] == IDS and link.is_symlink()
    write(dangling)
    assert [row["id"] for row in read(tmp_path / "made.jsonl")] == IDS
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["link.jsonl", "new.jsonl"]
    with Journal(out, SETTINGS), pytest.raises(InputError, match="is being written by another batch"):
        Journal(link, SETTINGS)


def test_rewriting_follows_no_link_and_keeps_the_mode(out, tmp_path):
    with Journal(out, SETTINGS) as journal:
        journal.begin()
        for key in ("a", "b"):
            journal.finish(line(key, ok=False, error="bad"))
    victim, link = tmp_path / "victim", tmp_path / "link.jsonl"
    victim.write_text("mine")
    (tmp_path / "answers.jsonl.part").symlink_to(victim)
    link.symlink_to(out)
    out.chmod(0o640)
    with Journal(link, SETTINGS) as journal:
        journal.begin(retry={"a"})
        journal.finish(line("a"))
    assert victim.read_text() == "mine" and link.is_symlink() and not out.is_symlink()
    assert [row["id"] for row in read(out)] == ["b", "a"] and out.stat().st_mode & 0o777 == 0o640


def test_what_is_not_one_file_is_refused(out, tmp_path):
    (tmp_path / "answers.jsonl.state").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="cannot write .*state"):
        Journal(out, SETTINGS)
    assert not (tmp_path / "victim").exists()
    (tmp_path / "answers.jsonl.state").unlink()
    write(out)
    os.link(out, tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="has another name .a hard link.: name another file, or copy it"):
        Journal(tmp_path / "other.jsonl", SETTINGS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file: name another"):
        Journal(tmp_path / "pipe", SETTINGS)


def test_lines_nested_too_deep_are_no_answers(out):
    out.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(InputError, match="is not an answer of a batch"):
        Journal(out, SETTINGS)


@pytest.mark.parametrize(
    "content",
    [b"notes\nmine\n", b"notes", b'{"id": 1}\n{"id": 2}', b'{"id": [], "ok": true}\n', b"\x89PNG\n", b"{}\nx", b"\n"],
)
def test_a_file_that_is_not_a_batchs_is_refused_and_left_alone(content, out):
    out.write_bytes(content)
    with pytest.raises(InputError, match="is not an answer of a batch: name another file"):
        Journal(out, SETTINGS)
    assert out.read_bytes().rstrip(b"\n") == content.rstrip(b"\n") and list(out.parent.iterdir()) == [out]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot write .*No such file"):
        Journal(tmp_path / "none" / "a.jsonl", {})
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot write .*Is a directory"):
        Journal(tmp_path / "a.jsonl", {})


def test_a_full_disk_leaves_whole_lines(out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(out, {}) as journal:
        journal.begin()
        journal.finish(line("a"))
        whole = out.read_bytes()
        try:
            # The kernel writes what fits, then refuses, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
            with pytest.raises(InputError, match="cannot write .*: make room"):
                journal.finish(line("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert out.read_bytes() == whole and "b" not in journal.done
        journal.finish(line("b"))
    assert read(out) == [line("a"), line("b")]


class Instant:
    """A worker that has answered as soon as it is asked, without a process."""

    def __init__(self, number):
        self.number, self.ready, self.group, self.asked, self.deadline = number, False, None, None, float("inf")
        reader, self.writer = os.pipe()
        self.connection = os.fdopen(reader, "rb", 0)
        os.write(self.writer, b"r")

    def ask(self, question, timeout):
        self.asked = question
        os.write(self.writer, b"a")

    def reply(self):
        from sfllava_fast.batch.workers import Reply

        kind = self.connection.read(1)
        return (Reply.READY, None, 0.0) if kind == b"r" else (Reply.ANSWERED, {"answer": "yes"}, 0.25)

    def kill(self):
        self.connection.close()
        os.close(self.writer)


def test_the_order_of_what_is_written(out, monkeypatch):
    """A question is in the state before a worker has it."""
    told = []
    for name in ("begin", "start", "finish"):
        real = getattr(Journal, name)
        monkeypatch.setattr(Journal, name, lambda self, *a, _n=name, _r=real: (told.append(_n), _r(self, *a))[1])
    ask = Instant.ask
    monkeypatch.setattr(Instant, "ask", lambda *a: (told.append("ask"), ask(*a))[1])
    questions = deque([Question(1, "v", "?"), Question(2, "v", "?")])
    with Journal(out, {}) as journal:
        Scheduler([Group("v", questions)], journal, Instant).run(1)
    assert told == ["begin", "start", "ask", "finish", "start", "ask", "finish"]
    assert read(out)[0] == {"id": 1, "video": "v", "question": "?", "ok": True, "answer": "yes"} | {
        "attempts": 1,
        "seconds": 0.25,
    }
