"""Pixels loaded in the background: bit for bit those of one go, in bounded memory, and no thread left behind."""

from __future__ import annotations

import threading
import time

import clips
import pytest

torch = pytest.importorskip("torch")

from sfllava_fast.errors import InputError, VideoError
from sfllava_fast.video import Video, open_video
from sfllava_fast.video import pixels as module
from sfllava_fast.video.pixels import load_pixels
from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

SPEC = PreprocessSpec(size=24, crop=(24, 24))
ASKS = {
    "some": list(range(0, 40, 3)),
    "one": [7],
    "repeats": [0, 0, 5, 5, 5, 9, 39, 39],
    "backwards": [39, 0, 20, 3, 3, 38, 1, 2, 0, 39],
}


class Drawn(Video):
    """Forty frames of noise. `decoded` counts those handed out, `freed` tells that the stream was closed."""

    def __init__(self, path="drawn", fail_at=None, hang_at=None):
        super().__init__(path)
        self.total, self.fps, self.size = 40, 25.0, (30, 52)
        self.clip = torch.randint(
            0, 256, (40, 30, 52, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        self.fail_at, self.hang_at = fail_at, hang_at
        self.error = VideoError("drawn is damaged: draw it again")
        self.decoded, self.freed, self.hangs = 0, False, threading.Event()

    def _stream(self, unique, stop):
        try:
            for number in unique:
                while number == self.hang_at and not stop.is_set():
                    self.hangs.set()
                    time.sleep(0.001)
                if stop.is_set():
                    return
                if number == self.fail_at:
                    raise self.error
                self.decoded += 1
                yield number, self.clip[number].numpy()
        finally:
            self.freed = True


@pytest.fixture(params=[1, 2], ids="{} thread(s)".format, autouse=True)
def threads(request):
    """What torch is allowed; and every test ends with the threads it began with."""
    allowed, before = torch.get_num_threads(), threading.enumerate()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(allowed)
    assert threading.enumerate() == before


def one_go(video, indices, dtype=torch.float32, spec=SPEC):
    return preprocess(video.frames(indices), spec, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 16, 100])
@pytest.mark.parametrize("ask", ASKS)
def test_the_pixels_of_one_go_in_batches(ask, batch, dtype):
    indices = ASKS[ask]
    got = list(load_pixels(Drawn(), indices, SPEC, dtype, batch=batch))
    assert [len(part) for part in got[:-1]] == [batch] * (len(got) - 1)
    assert all(part.is_contiguous() for part in got)
    assert torch.equal(torch.cat(got), one_go(Drawn(), indices, dtype))


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_other_ways_to_fit(mode):
    spec = PreprocessSpec(size=24, crop=(20, 24), mode=mode)
    got = torch.cat(list(load_pixels(Drawn(), range(9), spec, batch=4)))
    assert torch.equal(got, one_go(Drawn(), range(9), spec=spec))


@pytest.mark.parametrize("decoder", ["pyav", "decord", "images"])
def test_of_every_reader(decoder, tmp_path):
    pytest.importorskip({"pyav": "av"}.get(decoder, decoder if decoder == "decord" else "PIL"))
    if decoder == "images":
        Image = pytest.importorskip("PIL.Image")
        for number, frame in enumerate(Drawn().clip):
            Image.fromarray(frame.numpy()).save(tmp_path / f"{number}.png")
        video = open_video(tmp_path)
    else:
        video = open_video(clips.make(tmp_path, "plain.mp4"), decoder)
    indices = [*range(0, 40, 4), 39, 2]
    got = torch.cat(list(load_pixels(video, indices, SPEC, batch=4)))
    assert torch.equal(got, one_go(video, indices))


def test_no_frames():
    assert list(load_pixels(Drawn(), [], SPEC)) == []


def test_pixels_are_plain_tensors_for_a_consumer_in_inference_mode():
    with torch.inference_mode():
        (pixels,) = load_pixels(Drawn(), [1, 2], SPEC)
    assert not pixels.requires_grad and not pixels.is_inference()


def test_an_error_of_the_decoder_is_raised_as_itself():
    video = Drawn(fail_at=12)
    with pytest.raises(VideoError) as caught:
        list(load_pixels(video, range(40), SPEC, batch=4))
    assert caught.value is video.error and video.freed


def test_an_error_of_a_worker_is_raised_as_itself(monkeypatch):
    error = InputError("no such picture")

    def fail(*args):
        raise error

    monkeypatch.setattr(module, "write_pixels", fail)
    video = Drawn()
    with pytest.raises(InputError) as caught:
        list(load_pixels(video, range(40), SPEC, batch=4))
    assert caught.value is error and video.freed


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_consumer_that_fails_stops_everything(error):
    video = Drawn()
    with pytest.raises(error), load_pixels(video, range(40), SPEC, batch=2) as pixels:
        for _ in pixels:
            raise error
    assert video.freed and video.decoded < 40


def test_a_consumer_that_breaks_off_stops_everything():
    video = Drawn()
    batches = iter(load_pixels(video, range(40), SPEC, batch=2))
    next(batches)
    batches.close()
    assert video.freed and video.decoded < 40


def test_a_long_decode_is_cut_short():
    video = Drawn(hang_at=5)
    with load_pixels(video, range(40), SPEC, batch=2) as pixels:
        taken = iter(pixels)
        next(taken)
        assert video.hangs.wait(10)
    assert video.freed and video.decoded == 5


def test_closed_before_it_began():
    pixels = load_pixels(Drawn(), range(40), SPEC)
    pixels.close()
    with pytest.raises(InputError, match="closed: call load_pixels again"):
        next(iter(pixels))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_slow_consumer_is_waited_for(batch):
    video, given = Drawn(), 0
    for pixels in load_pixels(video, range(40), SPEC, batch=batch):
        given += len(pixels)
        settled = -1
        while settled != video.decoded:
            settled = video.decoded
            time.sleep(0.005)
        assert video.decoded <= given + 2 * batch
    assert given == 40


def test_frames_in_work_are_few(monkeypatch, threads):
    gate, video = threading.Event(), Drawn()
    whole = module.write_pixels
    monkeypatch.setattr(module, "write_pixels", lambda *args: gate.wait(10) and whole(*args))
    with load_pixels(video, range(40), SPEC, batch=40) as pixels:
        until = time.monotonic() + 10
        while video.decoded <= threads and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)  # for one that would be too many
        assert video.decoded == threads + 1
        gate.set()
        (got,) = pixels
    assert torch.equal(got, one_go(Drawn(), range(40)))


def test_clocks(monkeypatch):
    whole = module.write_pixels
    monkeypatch.setattr(module, "write_pixels", lambda *args: (time.sleep(0.002), whole(*args)))
    pixels = load_pixels(Drawn(), range(10), SPEC, batch=5)
    assert (pixels.decode_seconds, pixels.preprocess_seconds, pixels.wait_seconds) == (0, 0, 0)
    assert len(list(pixels)) == 2
    assert pixels.decode_seconds > 0 and pixels.preprocess_seconds > 0.02 and pixels.wait_seconds > 0


def test_what_cannot_work_is_refused_before_it_starts():
    with pytest.raises(InputError, match="frame 40 does not exist"):
        load_pixels(Drawn(), [0, 40], SPEC)
    with pytest.raises(InputError, match="cannot crop 60x60"):
        load_pixels(Drawn(), [0], PreprocessSpec(size=None, crop=(60, 60)))
    for batch in (0, 2.5):
        with pytest.raises(InputError, match="batch must be"):
            load_pixels(Drawn(), [0], SPEC, batch=batch)
