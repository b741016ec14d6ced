"""`make fuzz`: random calls, files, kills and replies, until the time is up. Not part of `make test`.

    python tests/support/fuzz.py [op] [video] [decord] [images] [plan] [batch] [session] [server]

Environment: SECONDS per target (60), SEED (0). Case n of a target depends only on "SEED+n". The first finding ends the
run and prints its seed; `SEED=that SECONDS=0` reproduces it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import oracle
from damaged_bytes import damaged
from kernel_cases import DTYPES, SOURCES, VIEWS, GuardedRows, assert_same, normal

from sfllava_fast import SlowFastLayout, slowfast_aggregate
from sfllava_fast.errors import InputError, ServerError, SfllavaError, VideoError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.slowfast import SLOW_POOLS

ROOT = Path(__file__).parents[2]
Case = Callable[[random.Random], str]


# --- the op


@contextmanager
def op(folder: Path) -> Iterator[Case]:
    """Calls of the op, by the kernels as by the reference bit for bit, and near float64; wrong ones are one line."""
    torch.set_num_threads(1)
    yield lambda random_: random_.choice([_slowfast, _slowfast, _pathways, _pathways, _wrong_call])(random_)


def _draw_features(random_: random.Random, frames: int, patches: int, make: Callable[..., torch.Tensor] | None = None):
    dtype, make = random_.choice(DTYPES), make or random_.choice(SOURCES)
    channels = random_.choice([1, 3, 8, 16, 33, 64])
    torch.manual_seed(random_.randrange(1 << 31))
    view = random_.choice(list(VIEWS))
    return VIEWS[view](lambda shape: make(shape, dtype), frames, patches, channels)


def _same_as_reference(random_: random.Random, features: torch.Tensor, layout: str, **call: Any) -> torch.Tensor:
    expected = slowfast_aggregate(features, layout, backend="torch", **call)
    packed = isinstance(expected, tuple)
    tokens = expected[0] if packed else expected
    if random_.random() < 0.5:
        got = slowfast_aggregate(features, layout, backend="cpu", **call)
        assert_same(got[0] if packed else got, tokens)
    else:
        rows = GuardedRows(*tokens.shape, tokens.dtype)
        slowfast_aggregate(features, layout, backend="cpu", out=rows.rows, **call)
        assert_same(rows.rows, tokens)
        rows.check()
    return tokens


def _slowfast(random_: random.Random) -> str:
    grid, frames = (random_.randrange(2, 10), random_.randrange(2, 10)), random_.randrange(1, 7)
    slow, pool = random_.randrange(9), random_.choice(SLOW_POOLS)
    fast = (random_.randrange(1, 11), random_.randrange(1, 11)) if not slow or random_.random() < 0.7 else None
    features = _draw_features(random_, frames, grid[0] * grid[1], normal)
    tokens = _same_as_reference(random_, features, str(SlowFastLayout(slow, pool, fast)), grid=grid)
    exact = oracle.tokens(features.double().numpy(), grid, slow, pool, fast)
    step = torch.finfo(features.dtype).eps * 4
    np.testing.assert_allclose(tokens.double().numpy(), exact, rtol=step, atol=step)
    return "calls near float64 and bit for bit the reference"


def _pathways(random_: random.Random) -> str:
    lengths = [random_.randrange(1, 5) for _ in range(random_.randrange(1, 4))]
    grid = random_.randrange(1, 8), random_.randrange(1, 8)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    size = lambda rule: rule if rule == "each" else f"{rule}{random_.randrange(1, 5)}"  # noqa: E731
    bins = lambda *rules: size(random_.choice(["each", "stride", "adaptive", "linspace", *rules]))  # noqa: E731
    paths = [
        f"p{i}:{bins('repeat', 'every')},{bins()},{bins()},{random_.choice(['max', 'mean'])}"
        for i in range(random_.randrange(1, 4))
    ]
    layout = "+".join(paths)
    features = _draw_features(random_, sum(lengths), grid[0] * grid[1])
    try:
        parse_layout(layout).plan(tuple(lengths), grid)
    except SfllavaError as error:
        _one_line(error)
        _refused(lambda: slowfast_aggregate(features, layout, grid=grid, frame_offsets=offsets))
        return "layouts that do not fit, one line"
    _same_as_reference(random_, features, layout, grid=grid, frame_offsets=offsets)
    return "calls of several videos, bit for bit the reference"


def _wrong_call(random_: random.Random) -> str:
    x, layout = torch.zeros(4, 16, 3), "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
    offsets = random_.choice([[0, 4, 3], [1, 4], [0], [], [0, 9], [-1, 4]])
    text = list(layout)
    for _ in range(random_.randrange(1, 4)):
        text[random_.randrange(len(text))] = random_.choice("0123456789-_:,+;@xz é")
    calls = [
        lambda: slowfast_aggregate(x, "".join(text)),
        lambda: slowfast_aggregate(x, layout, grid=random_.choice([(3, 5), (0, 16), (-4, -4), (16, 2), (2**40, 1)])),
        lambda: slowfast_aggregate(x, layout, frame_offsets=offsets),
        lambda: slowfast_aggregate(x, layout, out=torch.empty(random_.choice([0, 5, 40]), 3)),
        lambda: slowfast_aggregate(x, layout, out=torch.empty(40, 3, dtype=torch.float16)),
        lambda: slowfast_aggregate(x, layout, backend=random_.choice(["cuda", "best", ""])),
        lambda: slowfast_aggregate(random_.choice([x[0], x.int(), x[:0], x.transpose(1, 2)]), layout),
    ]
    try:
        random_.choice(calls)()
    except SfllavaError as error:
        _one_line(error)
        return "wrong calls, one line"
    return "calls that were none the worse"


# --- videos


@contextmanager
def video(folder: Path) -> Iterator[Case]:
    """Damaged clips, each opened and read in a process of its own: read, or a VideoError of one line. What FFmpeg ends
    or hangs on is counted, and no finding of ours."""
    clips = [path.read_bytes() for path in _write_clips(folder)]
    with _reading("pyav") as read:
        yield lambda random_: read(_write_damaged(folder / "damaged", clips, random_), random_.randrange(1, 20))


@contextmanager
def decord(folder: Path) -> Iterator[Case | None]:
    """The same clips with decord."""
    if not find_spec("decord"):
        yield None
        return
    clips = [path.read_bytes() for path in _write_clips(folder)]
    with _reading("decord") as read:
        yield lambda random_: read(_write_damaged(folder / "damaged", clips, random_), random_.randrange(1, 20))


@contextmanager
def images(folder: Path) -> Iterator[Case]:
    """Folders of three images, one or more of them damaged, or of another kind or size than its name or the others."""
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    made = []
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        for mode in ("RGB", "P", "L"):
            if (suffix, mode) != ("jpg", "P"):
                Image.fromarray(picture).convert(mode).save(folder / f"whole.{suffix}")
                made.append((folder / f"whole.{suffix}").read_bytes())
    frames = folder / "frames"

    def draw(random_: random.Random) -> Path:
        shutil.rmtree(frames, ignore_errors=True)
        frames.mkdir()
        whole = random_.choice(made)
        for name in "012":
            path = frames / f"{name}.{random_.choice(['jpg', 'png', 'tiff'])}"
            if random_.random() < 0.5:
                _write_damaged(path, [whole], random_)
            else:
                path.write_bytes(random_.choice([whole, whole, whole, random_.choice(made)]))
        return frames

    with _reading("pyav") as read:
        yield lambda random_: read(draw(random_), 3)


def _write_damaged(path: Path, whole: list[bytes], random_: random.Random) -> Path:
    data = random_.choice(whole)
    for _ in range(random_.randrange(1, 4)):
        data = damaged(data, random_) or b"\0"
    path.write_bytes(data)
    return path


@contextmanager
def _reading(decoder: str) -> Iterator[Callable[[Path, int], str]]:
    reader = _Reader(decoder)
    try:
        reader.begin()
        yield reader.read
    finally:
        reader.end()


def _write_clips(folder: Path) -> list[Path]:
    import av

    made, picture = [], np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for name, codec in (("h.mp4", "libx264"), ("h.mkv", "libx264"), ("h.ts", "libx264"), ("m.avi", "mpeg4"),
                        ("m.mp4", "mpeg4"), ("v.webm", "libvpx"), ("g.gif", "gif"), ("j.avi", "mjpeg")):  # fmt: skip
        try:
            with av.open(str(folder / name), "w") as container:
                stream = container.add_stream(codec, rate=25)
                stream.width, stream.height = 64, 48
                stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
                for shift in range(24):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture, shift, 1), "rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except (av.error.FFmpegError, ValueError):  # a build without that encoder
            continue
        made.append(folder / name)
    return made


_READER_BYTES = 16 << 30


class _Reader:
    """A process that reads videos, restarted after it ended."""

    patience = 20.0

    def __init__(self, decoder: str) -> None:
        self.decoder = decoder
        self.context, self.process = multiprocessing.get_context("spawn"), None

    def begin(self) -> None:
        if self.process is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=_read_videos, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.connection.recv()

    def read(self, path: Path, frames: int) -> str:
        self.begin()
        self.connection.send((str(path), frames, self.decoder))
        try:
            if not self.connection.poll(self.patience):
                self.end()
                return f"outside software took more than {self.patience:.0f} s (counted, not ours)"
            outcome, told = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.end()
            return f"outside software ended the process by {signal.Signals(-code).name} (counted, not ours)"
        if outcome == "finding":
            raise AssertionError(told)
        return outcome

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _read_videos(connection: Any) -> None:
    import logging
    import resource

    from sfllava_fast.layouts.sampling import sample_frames
    from sfllava_fast.video import open_video

    logging.disable()  # of frames that are missing
    resource.setrlimit(resource.RLIMIT_AS, (_READER_BYTES, _READER_BYTES))
    connection.send("ready")
    while True:
        path, frames, decoder = connection.recv()
        try:
            clip = open_video(path, decoder)
            clip.frames(sample_frames(clip.total, frames))
            connection.send(("damaged videos read", None))
        except VideoError as error:
            ours = "\n" not in str(error)
            connection.send(("damaged videos refused, one line" if ours else "finding", str(error)))
        except BaseException:
            connection.send(("finding", traceback.format_exc()))


# --- tables of plans


@contextmanager
def plan(folder: Path) -> Iterator[Case | None]:
    """Corrupted tables of plans under the address and undefined-behaviour sanitizers: turned down, or run inside every
    buffer. A C++ program of the tests, for the same seconds."""
    if not (shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++"))):
        yield None
        return
    build = ROOT / "build" / "sanitize"
    options = ["-DSFLLAVA_SANITIZE=ON", "-DSFLLAVA_TESTS=ON"]
    for command in (["cmake", "-S", ROOT, "-B", build, *options], ["cmake", "--build", build, "--target", "plan_test"]):
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)

    def case(random_: random.Random) -> str:
        seed = random_.randrange(1 << 31)
        ran = subprocess.run([build / "tests" / "cpp" / "plan_test", str(seed)], capture_output=True, text=True)
        assert not ran.returncode, ran.stderr[-2000:]
        case.counts.update({"tables of plans, corrupted, inside every buffer": 30_000 - 1})
        return "tables of plans, corrupted, inside every buffer"

    case.counts = Counter()
    yield case


# --- kills of a batch

BATCH = """
import json, sys
from functools import partial
from pathlib import Path
from batch_answerers import make_obedient
from sfllava_fast.batch.questions import Question, by_video
from sfllava_fast.batch.run import run
if __name__ == "__main__":
    questions = [Question(*row) for row in json.loads(sys.argv[3])]
    run(by_video(questions), Path(sys.argv[1]), {}, partial(make_obedient, log=Path(sys.argv[2])), 2, attempts=50)
"""


@contextmanager
def batch(folder: Path) -> Iterator[Case]:
    """kill -9 of a batch, with its workers or without, at any moment, and the same command again until it ends:
    nothing lost, nothing doubled."""
    (folder / "batch.py").write_text(BATCH)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))}

    def case(random_: random.Random) -> str:
        out, log = folder / "answers.jsonl", folder / "asked"
        rows = [(f"{video}{i}", video, f"wait 0.0{random_.randrange(9)}") for video in "abcde" for i in range(8)]
        command = [sys.executable, str(folder / "batch.py"), str(out), str(log), json.dumps(rows)]
        for path in folder.glob("a*"):
            path.unlink()
        kills = random_.randrange(1, 4)
        for number in range(kills + 1):
            process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)
            if number < kills:
                _wait_for_lines(log, random_.randrange(0, 14), process)
                time.sleep(random_.random() * 0.05)
                (os.killpg if random_.random() < 0.7 else os.kill)(process.pid, signal.SIGKILL)
            told = process.communicate(timeout=120)[1]
            assert number < kills or process.returncode == 0, told.decode()
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert sorted(line["id"] for line in lines) == sorted(key for key, _, _ in rows), "lost or doubled"
        said = {key: f"{text}!" for key, _, text in rows}
        assert all(line["ok"] and line["answer"] == said[line["id"]] for line in lines)
        case.counts.update({"kills -9 of a batch, nothing lost or doubled": kills - 1})
        return "kills -9 of a batch, nothing lost or doubled"

    case.counts = Counter()
    yield case


def _wait_for_lines(log: Path, lines: int, process: subprocess.Popen) -> None:
    """Wait until this many more questions were asked, or the batch ended."""
    count = lambda: log.read_bytes().count(b"\n") if log.exists() else 0  # noqa: E731
    begun = count()
    while count() < begun + lines and process.poll() is None:
        time.sleep(0.005)


# --- saved sessions


@contextmanager
def session(folder: Path) -> Iterator[Case]:
    """Saved sessions with damage: refused in one line; and undamaged ones that go on as they would have."""
    from tiny_engine import LAYOUT, QUESTION, Clip
    from tiny_llava import write_checkpoint

    from sfllava_fast.engine.slowfast_llava import SlowFastLlava

    model = SlowFastLlava.from_pretrained(write_checkpoint(folder / "model"), LAYOUT)
    held = model.open(Clip(), frames=9)
    said = held.ask(QUESTION, max_new_tokens=6).token_ids
    whole = held.save(folder / "whole").read_bytes()

    def case(random_: random.Random) -> str:
        data = whole
        for _ in range(random_.randrange(0 if random_.random() < 0.05 else 1, 4)):
            data = damaged(data, random_) or b"\0"
        (folder / "session").write_bytes(data)
        if data == whole:
            assert model.load_session(folder / "session").ask(QUESTION, max_new_tokens=6).token_ids == said
            return "saved sessions that went on"
        _refused(lambda: model.load_session(folder / "session"), InputError)
        return "damaged sessions refused, one line"

    yield case


# --- replies of a server


@contextmanager
def server(folder: Path) -> Iterator[Case]:
    """Replies of a server with damage, at every level of HTTP and JSON, and long ones of a judge: a text and a verdict,
    or an error of one line, in time."""
    from sfllava_fast.batch.chat import Chat
    from sfllava_fast.batch.score import RULES, rate, read_verdict

    reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": "a red circle"}}]}).encode()
    head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(reply), reply)
    redirect = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/v1\r\nContent-Length: 0\r\n\r\n"
    odd = [3, None, [], {}, {"choices": {}}, {"choices": []}, {"choices": [3]}, {"choices": [{"message": None}]}]
    odd += [{"choices": [{"message": {"content": {"a": [1]}}}]}, {"error": {"message": ["no"]}}, {"error": 5}]
    bodies = [reply, b"", b"[" * 100_000, b"\xff\xfe", *(json.dumps(body).encode() for body in odd)]
    statuses = [200, 200, 200, 200, 204, 301, 400, 401, 404, 408, 418, 429, 500, 502, 503, 999]
    now = {"reply": b""}
    door = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_serve, args=(door, now), daemon=True)
    thread.start()
    chat = Chat(f"http://127.0.0.1:{door.getsockname()[1]}/v1", "model", timeout=5, patience=0)

    def case(random_: random.Random) -> str:
        if random_.random() < 0.2:
            return judged(random_)
        body = random_.choice(bodies)
        data = random_.choice([head % (random_.choice(statuses), len(body)) + body, chunked, redirect])
        for _ in range(random_.randrange(3)):
            data = damaged(data, random_) or b"\0"
        now["reply"] = data
        begun = time.monotonic()
        try:
            said = chat.reply([{"role": "user", "content": "what is it?"}], 8)
            assert isinstance(said, str)
            outcome = "odd replies read"
        except SfllavaError as error:
            _one_line(error)
            outcome = "odd replies refused, one line"
        assert time.monotonic() - begun < 30, "a reply that did not end"
        return outcome

    def judged(random_: random.Random) -> str:
        text, verdict = _long_reply(random_)
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        now["reply"] = head % (200, len(body)) + body
        begun = time.monotonic()
        try:
            read = read_verdict(chat.reply([{"role": "user", "content": "right?"}], 8))
            assert verdict in (None, read), f"{read} is not the verdict {verdict}"
            assert all(len(rate(read, rule)) == 2 for rule in RULES)
            outcome = "long replies of a judge read"
        except ServerError as error:
            _one_line(error)
            assert verdict is None, "a verdict that was not found"
            outcome = "long replies of a judge without a verdict, one line"
        assert time.monotonic() - begun < 30, "a reply that was not read in time"
        return outcome

    try:
        yield case
    finally:
        door.close()


def _long_reply(random_: random.Random) -> tuple[str, dict[str, Any] | None]:
    """A judge's reply, and the verdict that it ends with; None if it may have any or none."""
    pred, score = random_.choice(["yes", "no", "Yes.", "", "\u00fc"]), random_.choice([0, 5, 4.5, "3", -1])
    verdict = {"pred": pred, "score": score}
    written = random_.choice([json.dumps, repr])(verdict)
    pieces = [*"{}[]:,\n'", '"', "<think>", "</think>", "```json", "pred", "score", "yes ", "x" * 99]
    pieces += [written, written[:-1], written[1:], "{" * 50, "[" * 50, "1e999", "\u2028", "\0", "\ud83d"]
    text = "".join(random_.choices(pieces, k=random_.randrange(1, 10 ** random_.randrange(1, 5))))
    return (f"{text}</think> {written}", verdict) if random_.random() < 0.5 else (text, None)


def _serve(door: socket.socket, now: dict[str, bytes]) -> None:
    while True:
        try:
            caller, _ = door.accept()
        except OSError:
            return
        with caller:
            try:
                caller.settimeout(5)
                received = b""
                while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                    received += caller.recv(65536)
                caller.sendall(now["reply"])
            except OSError:
                pass


# --- what all share


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1000, f"not one line: {error}"


def _refused(use: Callable[[], Any], kind: type[Exception] = SfllavaError) -> None:
    try:
        use()
    except kind as error:
        _one_line(error)
        return
    raise AssertionError("taken without a word")


TARGETS = {
    "op": op,
    "video": video,
    "decord": decord,
    "images": images,
    "plan": plan,
    "batch": batch,
    "session": session,
    "server": server,
}
NEEDS = {"decord": "decord", "plan": "CMake or a C++ compiler"}


def fuzz(name: str, seed: int, seconds: float) -> bool:
    """Run one target; whether it found nothing."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, TARGETS[name](Path(folder)) as case:
        if case is None:
            print(f"{name}: skipped, {NEEDS[name]} is not installed", flush=True)
            return True
        end = time.monotonic() + seconds
        while True:
            try:
                outcomes[case(random.Random(seed))] += 1
            except Exception:
                traceback.print_exc()
                print(f"{name}: FOUND; again: SEED={seed} SECONDS=0 python tests/support/fuzz.py {name}", flush=True)
                return False
            seed += 1
            if time.monotonic() >= end:
                break
        outcomes.update(getattr(case, "counts", {}))
    print(f"{name}: " + "; ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())), flush=True)
    return True


def main(names: list[str]) -> int:
    if unknown := set(names) - set(TARGETS):
        print(f"no target {', '.join(sorted(unknown))}: choose among {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    seed, seconds = int(os.environ.get("SEED", 0)), float(os.environ.get("SECONDS", 60))
    return 0 if all(fuzz(name, seed, seconds) for name in names or TARGETS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
