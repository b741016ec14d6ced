"""Batches through an OpenAI-compatible server: what is sent, and what each kind of failure comes to."""

import base64
import contextlib
import json
import os
import shutil
import socket
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import clips
import pytest
from openai_server import serving

from sfllava_fast.batch import answerers
from sfllava_fast.batch import chat as chat_module
from sfllava_fast.batch.chat import Chat
from sfllava_fast.batch.questions import Question
from sfllava_fast.cli import main as cli
from sfllava_fast.errors import BackendError, InputError, ServerError
from sfllava_fast.model.prompts import build_prompt


def words_of(body):
    return body["messages"][-1]["content"][-1]["text"]


def video_of(body):
    return body["messages"][-1]["content"][0]["video_url"]["url"]


@pytest.fixture
def chat(monkeypatch):
    """Makes a client whose pauses take no time; `chat.pauses` has them."""
    pauses, clock = [], [0.0]

    def sleep(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(chat_module.time, "sleep", sleep)
    monkeypatch.setattr(chat_module.time, "monotonic", lambda: clock[0])

    def make(server, **options):
        return Chat(server.url, **options)

    make.pauses = pauses
    return make


def ask(client, text="hello"):
    return client.reply([{"role": "user", "content": text}], 7)


def test_a_request_and_its_reply(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda body: f" {body['messages'][0]['content']}! ") as server:
        assert ask(chat(server)) == "hello!" and server.headers["Authorization"] == "Bearer secret"
        assert ask(Chat(server.url.removesuffix("/v1") + "/", "second"), "you") == "you!"
        monkeypatch.delenv("OPENAI_API_KEY")
        assert ask(chat(server)) == "hello!" and "Authorization" not in server.headers
        assert server.requests[0] == {
            "model": "first",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0,
        }
        assert server.requests[1]["model"] == "second"


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ((400, {"error": {"message": "bad\nvideo"}}), InputError, "says 400 bad video"),
        ((422, {"message": "too long"}), InputError, "says 422 too long"),
        ((413, b"<html>"), InputError, "says 413 <html>"),
        ((500, {"error": "broken"}), ServerError, "says 500 broken"),
        ((401, {"error": {"message": "no key"}}), BackendError, "says 401 no key: check URL, model and OPENAI_API_KEY"),
        ((404, {}), BackendError, "says 404 .*: check URL"),
        ((200, {"choices": []}), ServerError, "a reply without a message"),
        ((200, {"choices": [{"message": {"content": {"text": "x"}}}]}), ServerError, "a reply without a message"),
        ((200, [[float("nan")]]), ServerError, r"a reply without a message: \[\[NaN"),
        ((200, b"<html>\x1b[2J"), ServerError, r"a reply that is not JSON: '<html>\?\[2J'"),
        ((200, b"[" * 100_000), ServerError, "a reply that is not JSON"),
        ((200, b"9" * 5000), ServerError, "a reply that is not JSON|without a message"),
        ((200, b" " * (17 << 20)), ServerError, "a reply of more than 16 MiB"),
        ((500, b"x" * (17 << 20)), ServerError, "a reply of more than 16 MiB"),
        ((302, {}), BackendError, "redirects .302., which is not followed: name the URL"),
        (lambda file: file.write(b"SPAM\r\n\r\n"), ServerError, "broke off .BadStatusLine"),
        (lambda file: file.write(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{"), ServerError, "not JSON: '{'"),
        (None, ServerError, "broke off"),
    ],
)
def test_a_request_that_fails_is_sent_once(reply, error, message, chat):
    with serving(lambda body: reply) as server:
        with pytest.raises(error, match=message) as raised:
            ask(chat(server))
        assert type(raised.value) is error and "\n" not in str(raised.value)
        assert len(server.requests) == 1 and chat.pauses == []


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_busy_server_is_waited_for_in_longer_and_longer_pauses(status, chat):
    replies = iter([(status, {"error": "busy"})] * 7 + ["at last"])
    with serving(lambda body: next(replies)) as server:
        assert ask(chat(server)) == "at last"
    assert chat.pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_server_that_is_gone_is_waited_for_so_long(chat):
    with serving(lambda body: "here") as server:
        client = chat(server, patience=60)
        ask(client)
    with pytest.raises(BackendError, match="cannot be used .*refused.*: see to it, then run again"):
        ask(client)
    assert 30 <= sum(chat.pauses) <= 60
    with pytest.raises(BackendError, match="cannot be used"):
        chat(server)
    assert sum(chat.pauses) <= 60  # and not at all before it was ever seen


def test_a_server_that_comes_back_goes_on(chat, monkeypatch):
    with serving(lambda body: "here") as server:
        client = chat(server)
    sleep, back = chat_module.time.sleep, []

    def restart(seconds):
        sleep(seconds)
        if len(chat.pauses) == 3:
            back.append(serving(lambda body: "again", server.server_port))
            back[0].__enter__()

    monkeypatch.setattr(chat_module.time, "sleep", restart)
    try:
        assert ask(client) == "again"
    finally:
        back[0].__exit__(None, None, None)


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 500 X\r\n\r\n"]
)
def test_a_reply_that_does_not_come_or_drips_is_cut_off(begin, chat):
    end = threading.Event()

    def drip(file):
        file.write(begin)
        while begin and not end.wait(0.05):
            file.write(b" ")
        end.wait(30)

    with serving(lambda body: drip) as server:
        with pytest.raises(ServerError, match="gave no reply within 0.4 seconds"):
            ask(chat(server, timeout=0.4))
        end.set()


def test_a_handshake_of_tls_that_drips_is_cut_off():
    """A record of 16 KiB is announced and comes byte by byte, each within the time-out of a read."""
    end = threading.Event()

    def drip(door):
        caller, _ = door.accept()
        with caller, contextlib.suppress(OSError):
            caller.sendall(b"\x16\x03\x03\x40\x00")
            while not end.wait(0.05):
                caller.sendall(b"\0")

    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=drip, args=(door,), daemon=True)
        thread.start()
        client = Chat(f"https://127.0.0.1:{door.getsockname()[1]}/v1", "model", timeout=0.4, patience=0)
        with pytest.raises(ServerError, match="gave no reply within 0.4 seconds"):
            ask(client)
        end.set()
        thread.join()


def test_there_is_a_time_limit_by_default(chat):
    with serving(lambda body: "here") as server:
        assert chat(server).timeout == 600 and chat(server, timeout=5.0).timeout == 5


def test_the_newer_name_of_the_limit_is_used_where_the_older_is_refused(chat):
    refusal = (400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}})
    with serving(lambda body: refusal if "max_tokens" in body else "yes") as server:
        client = chat(server)
        assert [ask(client), ask(client)] == ["yes", "yes"]
        assert [body.get("max_completion_tokens") for body in server.requests] == [None, 7, 7]
        server.answer = lambda body: (400, {"error": "not max_completion_tokens either"})
        with pytest.raises(InputError, match="says 400 not max_completion_tokens either"):
            ask(chat(server))


@pytest.mark.parametrize(
    "url",
    ["h:8000", "ftp://h", "http://", "", "http://[::1", "http://h:port", "http://h:70000", "http://h h", "http://\x1b"],
)
def test_wrong_urls(url):
    with pytest.raises(InputError, match="is not the URL of a server") as raised:
        Chat(url)
    assert "\x1b" not in str(raised.value)


KEY = "sk-EXAMPLE"


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@h:1", f"ftp://{KEY}@h", f"http://h:1/v1?key={KEY}", f"http://h:1/#{KEY}", f"{KEY}@h"]
)
def test_a_secret_in_a_url_is_not_repeated(url):
    with pytest.raises(InputError, match="put its key into OPENAI_API_KEY") as raised:
        Chat(url)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("around", ["{}\r", "{}\n", " {}\r\n", "\t{}"])
def test_blanks_around_the_key_are_taken_off(around, chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", around.format(KEY))
    with serving(lambda body: "yes") as server:
        assert ask(chat(server)) == "yes" and server.headers["Authorization"] == f"Bearer {KEY}"
        monkeypatch.setenv("OPENAI_API_KEY", around.format(""))
        assert ask(chat(server)) == "yes" and "Authorization" not in server.headers


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY}\x00", f"{KEY}\x7f", f"{KEY}\u00fc", f"{KEY}\ud83d"])
def test_a_key_that_no_header_takes_is_refused_without_it(key, monkeypatch):
    monkeypatch.setattr(chat_module.os, "environ", {"OPENAI_API_KEY": key})
    with pytest.raises(InputError, match="OPENAI_API_KEY has a control or non-ASCII character") as raised:
        Chat("http://127.0.0.1:9/v1")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "said",
    [(401, {"error": {"message": f"wrong key {KEY}"}}), (200, f"Bearer {KEY}".encode()), (200, {"headers": KEY})],
)
def test_a_key_that_the_server_repeats_is_not_told(said, chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda body: said) as server, pytest.raises((ServerError, BackendError)) as raised:
        ask(chat(server))
    assert KEY not in str(raised.value) and "***" in str(raised.value)


def test_a_key_that_a_server_repeats_in_json_is_not_told(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", 'secret"key')
    with (
        serving(lambda body: (200, {"choices": ['secret"key']})) as server,
        pytest.raises(ServerError, match="a reply without a message") as raised,
    ):
        ask(chat(server))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_and_the_key_stays(status, chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda body: "stolen") as other:
        elsewhere = f"HTTP/1.0 {status} X\r\nLocation: {other.url}/chat/completions\r\n\r\n".encode()
        with (
            serving(lambda body: lambda file: file.write(elsewhere)) as server,
            pytest.raises(BackendError, match=f"redirects .{status}., which is not followed"),
        ):
            ask(chat(server))
        assert other.requests == [] and other.headers == {}


# From the command line, with real client processes.


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a b.mp4", "c.webm", "bad.mp4"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def batch(tmp_path, videos):
    """Runs a batch of (video, question, choices) with ids 0, 1, ...: exit code and output by id."""

    def batch(server, rows, *options):
        path, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
        names = ("video", "question", "choices")
        lines = [{"id": i} | {k: v for k, v in zip(names, row) if v} for i, row in enumerate(rows)]
        path.write_text("".join(f"{json.dumps(line | {'question': line.get('question', '')})}\n" for line in lines))
        argv = [path, "--videos", videos, "--out", out, "--server", server.url, *options]
        code = cli.main(["batch", *map(str, argv)])
        answers = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        assert len({line["id"] for line in answers}) == len(answers)
        return code, {line["id"]: line for line in answers}

    return batch


def test_questions_are_sent_with_their_video(batch, videos):
    rows = [("a b", "What is it?", None), ("c.webm", "Which?", ["a cat", "a dog"]), ("a b", "Why?", None)]
    with serving(lambda body: "B: it is" if "Options" in words_of(body) else words_of(body).upper()) as server:
        code, lines = batch(server, rows, "--workers", 2)
        assert code == 0 and [lines[i]["answer"] for i in range(3)] == ["WHAT IS IT?", "B: it is", "WHY?"]
        assert (lines[1]["choice"], lines[1]["option"]) == ("a dog", 1)
        sent = {words_of(body): body for body in server.requests}
        assert video_of(sent["Why?"]) == (videos / "a b.mp4").as_uri() and "%20" in video_of(sent["Why?"])
        assert all(body["max_tokens"] == 128 and body["temperature"] == 0 for body in server.requests)


def test_choices_are_in_the_words_of_our_own_prompt(batch, checkpoints):
    from transformers import AutoTokenizer

    with serving(lambda body: "A") as server:
        batch(server, [("c", " Which one? ", ["a cat", "a dog"])])
    prompt = build_prompt(" Which one? ", AutoTokenizer.from_pretrained(checkpoints()), "vicuna", ["a cat", "a dog"])
    assert words_of(server.requests[0]) in prompt.text and "(B) a dog" in words_of(server.requests[0])


def test_videos_are_uploaded_on_request(batch, videos):
    (videos / "frames").mkdir()
    clip = clips.make(videos, "plain.mp4").rename(videos / "real.mp4")
    (videos / "link.mp4").symlink_to("real.mp4")
    rows = [(name, "x", None) for name in ("real", "frames", "none", "link", "a\0b", "a b", str(clip), "\ud83d")]
    with serving(lambda body: "yes") as server:
        code, lines = batch(server, rows, "--upload")
        assert code == 1 and [key for key, line in lines.items() if line["ok"]] == [0, 3, 6]
        for body in server.requests:
            head, data = video_of(body).split(",")
            assert head == "data:video/mp4;base64" and base64.b64decode(data) == clip.read_bytes()
    assert "is a folder of frames" in lines[1]["error"] and lines[1]["attempts"] == 1
    assert all("cannot be read" in lines[key]["error"] for key in (2, 4, 7))
    assert "a b.mp4" in lines[5]["error"] and len(server.requests) == 3, "no video is no upload"


@pytest.mark.parametrize("name", ["{outside}", "../secret", "link", "folder/secret"])
def test_only_videos_of_the_folder_are_uploaded_unless_others_are_asked_for(name, batch, videos, tmp_path):
    outside = clips.make(tmp_path, "plain.mp4").rename(tmp_path / "secret.mp4")
    (videos / "link.mp4").symlink_to(outside)
    (videos / "folder").symlink_to(tmp_path)
    rows = [(name.format(outside=outside), "x", None)]
    with serving(lambda body: "yes") as server:
        code, lines = batch(server, rows, "--upload")
        assert code == 1 and server.requests == [] and lines[0]["attempts"] == 1
        assert "so it is not sent: move it there, or give --upload-any" in lines[0]["error"]
        code, lines = batch(server, rows, "--upload-any", "--retry-errors")
        assert code == 0 and base64.b64decode(video_of(server.requests[0]).split(",")[1]) == outside.read_bytes()


def test_a_name_that_no_file_can_have_is_the_videos_fault(batch):
    with serving(lambda body: "yes") as server:
        code, lines = batch(server, [("\ud83d", "x", None), ("c", "half \ud83d", None), ("c", "x", None)])
    assert code == 1 and [lines[key]["ok"] for key in range(3)] == [False, False, True]
    assert "no name that a file can have" in lines[0]["error"] and lines[0]["quarantined"]
    assert "half of a surrogate pair" in lines[1]["error"] and lines[1]["attempts"] == 1


def test_a_video_that_the_server_refuses_is_its_own_error(batch):
    def answer(body):
        return (400, {"error": {"message": "cannot decode"}}) if "bad" in video_of(body) else "fine"

    rows = [("bad", "1", None), ("bad", "2", None), ("c", "3", None), ("c", "", None), ("c", "5", ["one"])]
    with serving(answer) as server:
        code, lines = batch(server, rows)
        assert code == 1 and [lines[i]["ok"] for i in range(5)] == [False, False, True, False, False]
        assert lines[0]["error"] == f"{server.url} says 400 cannot decode"
        assert Counter(video_of(body)[-7:] for body in server.requests) == {"bad.mp4": 2, "/c.webm": 1}
    assert "the question is empty" in lines[3]["error"] and "2 to 26" in lines[4]["error"]


def test_a_question_that_breaks_the_server_is_tried_again_and_its_video_goes_on(batch):
    with serving(lambda body: (500, {}) if "bad" in words_of(body) else "fine") as server:
        code, lines = batch(server, [("c", "bad", None), ("c", "2", None), ("d", "3", None)], "--attempts", 2)
    assert code == 1 and lines[1]["ok"] and lines[2]["ok"]
    assert lines[0]["attempts"] == 2 and not lines[0].get("quarantined") and "says 500" in lines[0]["error"]
    assert len(server.requests) == 4


def test_a_server_that_refuses_us_ends_the_batch_and_quarantines_nothing(batch, capsys):
    with serving(lambda body: (401, {"error": "no key"})) as server:
        for _ in range(2):
            assert batch(server, [("c", "1", None)], "--attempts", 1) == (2, {})
    assert "check URL, model and OPENAI_API_KEY" in capsys.readouterr().err


def test_a_server_cannot_be_resumed_as_a_model(batch, tmp_path, capsys):
    with serving(lambda body: "yes") as server:
        assert batch(server, [("c", "1", None)])[0] == 0
        assert batch(server, [("c", "1", None)], "--max-new-tokens", "5")[0] == 2
    assert cli.main(["batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "was begun with" in capsys.readouterr().err and Path(tmp_path / "a.jsonl").read_text().count("\n") == 1


def test_the_model_that_a_server_names_decides(batch, capsys):
    names = ["one", "one", "two"]
    with serving(lambda body: "yes") as server:
        server.models = names
        assert batch(server, [("c", "1", None)])[0] == 0 and server.requests[0]["model"] == "one"
        assert batch(server, [("c", "1", None)])[0] == 0
        assert batch(server, [("c", "1", None)], "--model", "one")[0] == 0
        del names[:2]
        assert batch(server, [("c", "1", None)])[0] == 2
    assert "was begun with model one, not two: use the same" in capsys.readouterr().err and len(server.requests) == 1


def test_answers_about_another_file_of_the_same_name_are_refused(batch, videos, capsys):
    rows = [("a b", "1", None), ("c", "2", None)]
    with serving(lambda body: "yes") as server:
        assert batch(server, rows)[0] == 0
        copy = videos.with_name("copy")
        shutil.copytree(videos, copy)  # with its times
        assert batch(server, rows, "--videos", copy)[0] == 0 and len(server.requests) == 2
        (copy / "c.webm").write_bytes(b"another")
        os.utime(copy / "a b.mp4", ns=(1, 1))
        assert batch(server, rows, "--videos", copy)[0] == 2
        err = capsys.readouterr().err
        assert "under the ids 0 (another video_file), 1 (another video_file): name another file, or" in err
        assert batch(server, rows)[0] == 0 and len(server.requests) == 2
        assert batch(server, rows, "--videos", copy, "--retry-changed")[0] == 0
        assert video_of(server.requests[3]) == (copy / "c.webm").as_uri() and len(server.requests) == 4
        shutil.rmtree(copy)  # what is answered needs no video
        assert batch(server, rows, "--videos", copy)[0] == 0 and len(server.requests) == 4


def test_an_error_about_a_video_that_was_replaced_is_asked_again(batch, videos):
    with serving(lambda body: (400, {"error": "no"})) as server:
        assert batch(server, [("c", "1", None)])[0] == 1 and batch(server, [("c", "1", None)])[0] == 1
        assert len(server.requests) == 1
        (videos / "c.webm").write_bytes(b"repaired")
        server.answer = lambda body: "yes"
        assert batch(server, [("c", "1", None)])[0] == 0


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"http://me:{KEY}@host/c.mp4?token={KEY}", "http://host/c.mp4"),
        (f"http://me:{KEY}@host/c.mp4#{KEY}", "http://host/c.mp4"),
        (f"https://me:a/{KEY}@host/c.mp4", "https://host/c.mp4"),
        (f"rtsp://me:a#{KEY}@host/c", "rtsp://..."),
        (f"http://host/c.mp4?token=a@{KEY}", "http://..."),
        (f"http://host/c.mp4?token={KEY}\n", "http://host/c.mp4"),
    ],
)
def test_a_url_as_a_video_is_refused_and_its_secrets_are_not_told(url, told, batch, capsys):
    with serving(lambda body: "yes") as server:
        assert batch(server, [("c", "x", None), (url, "x", None)], "--upload-any") == (2, {})
        assert server.requests == []
    out, err = capsys.readouterr()
    assert f"line 2 has a URL as its video, {told}: download it and name the file\n" in err
    assert out == "" and KEY not in err and err.count("\n") == 1


def test_a_video_that_is_too_large_is_not_read(batch, videos, monkeypatch):
    clip = clips.make(videos, "plain.mp4")
    with clip.open("ab") as file:
        file.truncate((1 << 20) + 1)
    (videos / "real.mp4").write_bytes(clip.read_bytes()[:-1])
    with serving(lambda body: "yes") as server:
        code, lines = batch(server, [("plain", "x", None), ("real", "x", None)], "--upload", "--max-upload", 1)
        assert code == 1 and len(server.requests) == 1 and lines[1]["ok"] and lines[0]["attempts"] == 1
        assert "has 1.0 MiB, and up to 1 are sent: cut or compress it, or raise --max-upload" in lines[0]["error"]
        assert batch(server, [("plain", "x", None)], "--max-upload", 1)[0] == 2


def test_the_bytes_of_a_video_are_kept_for_its_questions_unless_they_are_many(videos, monkeypatch):
    for name in ("one", "two"):
        clips.make(videos, "plain.mp4").rename(videos / f"{name}.mp4")
    asked = SimpleNamespace(reply=lambda *_: "yes")
    answerer = answerers.ServerAnswerer(asked, videos, 8, upload=True)
    read, plain = [], answerer._data_url
    answerer._data_url = lambda video: read.append(video.stem) or plain(video)
    for name in ("one", "one", "two", "one"):
        answerer(Question(1, name, "?"))
    assert read == ["one", "two", "one"]
    monkeypatch.setattr(answerers, "_KEPT", 10)
    answerer(Question(1, "two", "?"))
    assert answerer._kept == (None, "")


def test_a_name_of_several_lines_is_one_line_of_the_summary(batch, capsys):
    with serving(lambda body: (400, {"error": "no"})) as server:
        batch(server, [("c\nanswered    9\x1b[2J", "x", None)])
    err = capsys.readouterr().err
    assert "error       c answered 9\\x1b[2J: " in err and len(err.splitlines()) == 5
