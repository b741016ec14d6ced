"""The picture: that it says what the plan says, is whole, and refuses what it cannot draw."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sfllava_fast import inspect as module
from sfllava_fast.config import SlowFastConfig
from sfllava_fast.errors import InputError, LayoutError, VideoError
from sfllava_fast.inspect import COLOURS, encode_png, gather, render, token_boxes
from sfllava_fast.video import open_video

Image = pytest.importorskip("PIL.Image")

GRID = (8, 8)
LAYOUT = "slowfast-slow_4frms_spatial_1d_max_pool-fast_2x2"


@pytest.fixture
def clip(tmp_path):
    """A folder of 20 frames, each of one shade, left half darker."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(20):
        pixels = np.full((48, 80, 3), 10 * number + 20, np.uint8)
        pixels[:, :40] //= 2
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def to_array(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def covered(colour: str, pixels: np.ndarray) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels.astype(int) - wanted).max(axis=2) < 8).sum())


@pytest.mark.parametrize(
    "layout",
    [
        "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4",
        "slowfast-slow_2frms_concat-fast_3x5",
        "slowfast-slow_3frms_spatial_2d_avg_pool",
        "slowfast-fast_9x9",
    ],
)
@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (5, 12)])
def test_token_boxes_cover_what_the_tables_say(layout, grid):
    for tables in SlowFastConfig.parse(layout).plan(frames=6, grid=grid).pathways:
        numbers = np.arange(grid[0] * grid[1]).reshape(tables.shape)
        want = [numbers[r0:r1, c0:c1].ravel().tolist() for r0, r1 in tables.rows for c0, c1 in tables.cols]
        patches = numbers.reshape(grid)
        got = [
            sorted(n for top, bottom, left, right in boxes for n in patches[top:bottom, left:right].ravel())
            for boxes in token_boxes(tables, grid)
        ]
        assert got == want


def test_report_holds_the_plan(clip):
    report = gather(open_video(clip), SlowFastConfig.parse(LAYOUT), 10, GRID)
    assert report.indices == [1, 3, 5, 7, 9, 10, 12, 14, 16, 18]
    assert report.slow == {0, 2, 5, 7}
    assert report.plan.tokens == {"slow": 4 * 32, "fast": 10 * 4, "total": 168}
    assert [int(t[0, -1, 0]) for t in report.thumbs] == [10 * i + 20 for i in report.indices]
    slow, fast = report.examples
    assert (slow.row, fast.row) == (5, 6)
    assert (len(slow.tokens), len(fast.tokens)) == (32, 4)
    # The token's colour is the frame's, in its own half.
    assert set(fast.kept[:, :4].ravel()) == {70} and set(fast.kept[:, 4:].ravel()) == {140}


def test_patches_that_no_token_covers_stay_pale(clip):
    config = SlowFastConfig.parse("slowfast-slow_2frms_spatial_2d_max_pool")
    kept = gather(open_video(clip), config, 4, (5, 7)).examples[0].kept
    assert (kept[4] == 245).all() and (kept[:, 6] == 245).all() and (kept[:4, :6] != 245).all()


@pytest.mark.parametrize(
    ("layout", "frames", "grid"),
    [
        (LAYOUT, 16, GRID),
        (LAYOUT, 1, GRID),
        ("slowfast-fast_4x4", 20, (24, 24)),
        (LAYOUT, 20, (7, 9)),
        ("slowfast-slow_10frms_concat", 3, GRID),
    ],
)
def test_png_shows_the_pathways(layout, frames, grid, clip, tmp_path):
    pytest.importorskip("matplotlib")
    out = render(clip, tmp_path / "a.png", layout, frames, grid)
    pixels = to_array(out.read_bytes())
    assert pixels.shape[1] == 1540 and pixels.shape[0] > 400
    tokens = SlowFastConfig.parse(layout).plan(frames, grid).tokens
    for name, colour in COLOURS.items():
        # Nothing else of that colour is as large as the bar, which is wide by the pathway's share.
        bar = tokens[name] / tokens["total"] * 13.1 * 110 * 0.36 * 110
        assert (covered(colour, pixels) > 0.7 * bar) if tokens[name] else (covered(colour, pixels) < 50)


def test_many_frames_fit(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(64):
        Image.new("RGB", (30, 60), (number, 0, 0)).save(folder / f"{number}.png")
    width, height = Image.open(render(folder, tmp_path / "long.png", LAYOUT, 64, GRID)).size
    assert height < 1.5 * width


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_self_contained(clip, tmp_path):
    text = render(clip, tmp_path / "a.html", LAYOUT, 10, GRID).read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"""(src|href)=(?!["']data:)|url\(|@import""", text)
    kinds = [a["class"] for tag, a in page.tags if tag == "figure" and "class" in a]
    assert [row for row, kind in enumerate(kinds) if kind == "slow"] == [0, 2, 5, 7] and len(kinds) == 10
    assert "168 video tokens" in text and "slow 128 (76%)" in text and LAYOUT in text
    assert sum(tag == "rect" for tag, _ in page.tags) == 32 + 4
    picture = next(a["src"] for tag, a in page.tags if tag == "img")
    assert to_array(base64.b64decode(picture.partition(",")[2])).shape == (48, 80, 3)


def test_html_escapes_names(tmp_path):
    folder = tmp_path / "<b>&"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    text = render(folder, tmp_path / "a.html", LAYOUT, 4, GRID).read_text()
    assert "<b>&<" not in text and "&lt;b&gt;&amp;" in text


def test_html_needs_no_matplotlib_and_png_says_so(clip, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    render(clip, tmp_path / "a.html", LAYOUT, 4, GRID)
    with pytest.raises(Exception, match="a PNG needs matplotlib") as caught:
        render(clip, tmp_path / "a.png", LAYOUT, 4, GRID)
    assert type(caught.value).__name__ == "BackendError"


def test_encode_png_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    assert np.array_equal(to_array(encode_png(pixels)), pixels)


@pytest.mark.parametrize(
    ("out", "message"), [("a.jpg", "end in .png or .html"), ("no/such/a.png", "no folder")]
)
def test_bad_out(out, message, clip, tmp_path):
    with pytest.raises(InputError, match=message):
        render(clip, tmp_path / out, LAYOUT, 4, GRID)


def test_bad_video_and_layout(clip, tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        render(tmp_path / "none.mp4", tmp_path / "a.html", LAYOUT, 4, GRID)
    with pytest.raises(LayoutError, match="leaves no token"):
        render(clip, tmp_path / "a.html", "slowfast-slow_4frms_spatial_2d_max_pool", 4, (1, 8))
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing_half_written(error, clip, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def fail(report, path):
        path.write_text("half")
        raise error

    monkeypatch.setattr(module, "_write_html", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        render(clip, tmp_path / "a.html", LAYOUT, 4, GRID)
    assert sorted(tmp_path.iterdir()) == before
