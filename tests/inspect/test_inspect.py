"""The picture: that it says what the plan says, is whole, and refuses what it cannot draw."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from sfllava_fast import inspect as module
from sfllava_fast.errors import InputError, LayoutError, VideoError
from sfllava_fast.inspect import html, render
from sfllava_fast.inspect.html import encode_png
from sfllava_fast.inspect.report import COLOURS, PALE, SEPARATORS, gather, token_boxes
from sfllava_fast.layouts.presets import PRESETS, parse_layout
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.reduction.pruning import Pruning
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
        "pool:adaptive2,linear3,linear2,mean",
    ],
)
@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (5, 12)])
def test_token_boxes_cover_what_the_tables_say(layout, grid):
    for tables in parse_layout(layout).plan(frames=6, grid=grid).pathways:
        numbers = np.arange(grid[0] * grid[1]).reshape(tables.shape)
        want = [numbers[r0:r1, c0:c1].ravel().tolist() for r0, r1 in tables.rows for c0, c1 in tables.cols]
        patches = numbers.reshape(grid)
        got = [
            sorted(n for top, bottom, left, right in boxes for n in patches[top:bottom, left:right].ravel())
            for boxes in token_boxes(tables, grid)
        ]
        assert got == want


def test_report_holds_the_plan(clip):
    report = gather(open_video(clip), LAYOUT, 10, GRID)
    assert report.indices == [1, 3, 5, 7, 9, 10, 12, 14, 16, 18]
    slow, fast = report.pathways
    assert set(slow.alone) == {0, 2, 5, 7} and set(fast.alone) == set(range(10)) and not slow.lanes and not fast.lanes
    assert [[view.name for view in report.rings(row)] for row in (0, 1)] == [["slow"], ["fast"]]
    assert [share[:2] for share in report.shares()] == [("slow 128 (76%)", 128), ("fast 40 (24%)", 40)]
    assert [int(t[0, -1, 0]) for t in report.thumbs] == [10 * i + 20 for i in report.indices]
    assert (slow.example, fast.example) == ((5, 6), (6, 7))
    assert (len(slow.tokens), len(fast.tokens)) == (32, 4)
    # The token's colour is the frame's, in its own half.
    assert set(fast.colours[:, :4].ravel()) == {70} and set(fast.colours[:, 4:].ravel()) == {140}


def test_patches_that_no_token_covers_stay_pale(clip):
    kept = gather(open_video(clip), "slowfast-slow_2frms_spatial_2d_max_pool", 4, (5, 7)).pathways[0].colours
    assert (kept[4] == PALE).all() and (kept[:, 6] == PALE).all() and (kept[:4, :6] != PALE).all()


def test_bins_of_several_frames_are_lanes_and_their_example_is_a_mean(clip):
    (view,) = gather(open_video(clip), "pool:adaptive4,each,each,max", 10, GRID).pathways
    assert view.caption == "4 bins of 3 frames \u00d7 64 tokens (8\u00d78, the max of each patch)"
    assert view.bins == [(0, 3), (2, 5), (5, 8), (7, 10)] and view.lanes == [[(0, 3), (5, 8)], [(2, 5), (7, 10)]]
    assert view.reads == "4 bins of 3 frames" and not view.alone
    report = gather(open_video(clip), "all:adaptive1,adaptive1,adaptive2,max", 10, GRID)
    (view,) = report.pathways
    # Frames 1, 3, ... 18 are 10 * number + 20 on the right: 115 of them in the mean.
    assert set(view.colours[:, 4:].ravel()) == {115} and report.name_example(view) == "mean of frames #1 to #18"
    assert view.reads == "all frames together"


def test_frames_that_are_read_by_nobody_often_or_by_two(clip):
    report = gather(open_video(clip), "one:every4,each,each,max+two:linspace2,adaptive2,adaptive2,mean", 10, GRID)
    names = [[view.name for view in report.rings(row)] for row in range(10)]
    assert names == [["one", "two"], [], [], [], ["one"], ["two"], [], [], ["one"], []]
    assert [report.is_read(row) for row in range(10)] == [bool(name) for name in names]
    report = gather(open_video(clip), "pllava", 6, (12, 12))
    assert [report.repeats(row) for row in range(6)] == [" \u00d73"] * 5 + [""]
    assert len(report.pathways[0].bins) == 16


def test_linear_bins_weigh_their_patches(tmp_path):
    folder = tmp_path / "ramp"
    folder.mkdir()
    Image.fromarray(np.repeat(np.arange(0, 240, 40, dtype=np.uint8), 3).reshape(1, 6, 3)).save(folder / "1.png")
    (view,) = gather(open_video(folder), "pool:each,linear1,linear4,mean", 1, (1, 6)).pathways
    # Two bins on six patches: the middles of the segments, 1 and 4, lie on patches.
    assert view.tokens == [[(0, 1, 1, 2)], [(0, 1, 4, 5)]]
    (view,) = gather(open_video(folder), "pool:each,linear1,linear2,mean", 1, (1, 5)).pathways
    # Three bins on five patches: the middles of the segments are 1/3, 2 and 11/3.
    ramp = np.array([0, 40, 80, 120, 160, 200], float)
    patches = [(ramp[i * 6 // 5 : -(-(i + 1) * 6 // 5)]).mean() for i in range(5)]
    want = np.interp([1 / 3, 2, 11 / 3], range(5), patches)
    got = [view.colours[0, boxes[0][2], 0] for boxes in view.tokens]
    assert [boxes[0][2:] for boxes in view.tokens] == [(0, 2), (2, 3), (3, 5)]
    assert np.abs(np.array(got) - want).max() <= 0.51


def test_class_token_is_made_of_no_patch(clip):
    report = gather(open_video(clip), "videollm_online-interval", 5, GRID)
    token, pool = report.pathways
    assert token.tokens == [] and token.colours is None and token.caption == "5 frames \u00d7 1 token (the class token)"
    assert len(pool.tokens) == 9
    assert [view.name for view in report.rings(2)] == ["class", "pool"]
    said = "tokens of all pathways frame by frame", "interval between frames", "pooled before the projector"
    assert report.notes.split("  \u00b7  ") == list(said)


def test_canvas_is_drawn_as_the_tower_sees_it(clip):
    report = gather(open_video(clip), "ig_vlm", 8, GRID)
    (view,) = report.pathways
    assert view.bins == [(0, 6), (6, 8)] and view.reads == "2 pictures of 2 to 6 frames"
    assert view.picture.shape == (3 * 48, 2 * 80, 3) and report.total == 2 * 64
    shades = [10 * i + 20 for i in report.indices[6:]]
    assert [int(view.picture[0, x, 0]) for x in (79, 159)] == shades and (view.picture[48:] == 255).all()
    assert report.name_example(view) == f"composed of frames #{report.indices[6]} to #{report.indices[7]}"


@pytest.mark.parametrize("name", [*PRESETS, "llava_next_video-bilinear-newline_grid", "videollm_online-interval"])
@pytest.mark.parametrize("frames", [1, 9])
def test_budget_of_every_preset_adds_up(name, frames, clip):
    layout = parse_layout(name)
    report = gather(open_video(clip), name, frames, (13, 11))
    assert sum(share.tokens for share in report.shares()) == report.total
    assert report.total == layout.count_tokens(layout.count_pictures(frames), (13, 11))
    assert report.layout == name and report.source


def test_zeros_and_separators_have_their_share(clip):
    labels = [share.label for share in gather(open_video(clip), "video_chatgpt", 10, (4, 4)).shares()]
    assert labels == ["temporal 10 (9%)", "spatial 16 (14%)", "zeros 90 (78%)"]
    shares = gather(open_video(clip), "llava_video_slowfast-newline_grid", 10, (8, 8)).shares()
    want = [("slow", 16), ("fast", 9 * 4), ("newline", 4 + 9 * 2), ("separator", 10)]
    assert [(share.label.split()[0], share.tokens) for share in shares] == want
    assert len({share.colour for share in shares}) == 4 and shares[2].colour in SEPARATORS


def test_a_layout_brings_the_frames_and_grid_it_was_published_with(clip):
    assert gather(open_video(clip), "pllava").plan.grid == (24, 24)
    report = gather(open_video(clip), "ig_vlm")
    assert (len(report.indices), report.plan.lengths) == (6, (1,))
    assert gather(open_video(clip), "red_villm").plan.grid == (16, 16)
    assert len(gather(open_video(clip), "pool:each,each,each,max").indices) == 20


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
    tokens = SlowFastLayout.parse(layout).plan(frames, grid).tokens
    for name, colour in zip(("slow", "fast"), COLOURS):
        # Nothing else of that colour is as large as the bar, which is wide by the pathway's share.
        bar = tokens[name] / tokens["total"] * 13.1 * 110 * 0.36 * 110
        assert (covered(colour, pixels) > 0.7 * bar) if tokens[name] else (covered(colour, pixels) < 50)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_draws(name, clip, tmp_path):
    pytest.importorskip("matplotlib")
    pixels = to_array(render(clip, tmp_path / "a.png", name, 9, GRID).read_bytes())
    assert pixels.shape[1] == 1540 and (pixels[-20:] == 255).all() and (pixels[:, -30:] == 255).all()
    report = gather(open_video(clip), name, 9, GRID)
    for share in report.shares():
        if share.share > 0.1 and not share.label.startswith("zeros"):
            assert covered(share.colour, pixels) > 0.6 * share.share * 13.1 * 0.36 * 110**2
    text = render(clip, tmp_path / "a.html", name, 9, GRID).read_text()
    assert Page(text).open == [] and name in text and report.source in text and report.notes in text
    assert f"{report.total:,} video tokens" in text
    assert all(text.count(share.label.replace("<", "&lt;")) == 3 for share in report.shares())
    assert text.count("<rect ") == sum(len(boxes) for view in report.pathways for boxes in view.tokens)
    assert text.count("CLS") == (name == "videollm_online")


@pytest.mark.parametrize("kept", [None, Pruning(0.3)])
def test_no_text_of_a_png_overlaps_another(kept, clip, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    many = "+".join(f"pathway_{n}:adaptive{n},adaptive{n},adaptive{n},mean" for n in range(1, 8)) + ";newline@row"
    texts = []
    monkeypatch.setattr(module.png._Sheet, "save", lambda sheet, path, height: texts.extend(_extents(sheet, height)))
    with pytest.raises(InputError):  # nothing was saved
        render(clip, tmp_path / "a.png", many, 20, GRID, kept=kept)
    assert len(texts) > 60
    for one, (left, right, top, bottom, text) in enumerate(texts):
        assert left > 0.4 and right < 13.6 + 0.02, text
        for other in texts[:one]:
            apart = other[1] <= left or right <= other[0] or other[3] <= top or bottom <= other[2]
            assert apart, (text, other[4])


def _extents(sheet, height):
    """Left, right, top, bottom in inches, and the text, of everything that is written on a sheet."""
    sheet.figure.set_size_inches(sheet.width, height)
    sheet.axes.set_xlim(0, sheet.width)
    sheet.axes.set_ylim(height, 0)
    for text in sheet.axes.texts:
        if text.get_text():
            (left, low), (right, high) = text.get_window_extent(sheet.canvas.get_renderer()).get_points() / 100
            yield left, right, height - high, height - low, text.get_text()


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
    assert [row for row, kind in enumerate(kinds) if kind == "slow picked"] == [0, 2, 5, 7] and len(kinds) == 10
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


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_names_that_are_no_text(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / os.fsdecode(b"\xff\x1b[2J\n\xc3\xa9$x_{y")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    out = render(folder, tmp_path / "new" / "folder" / f"a{suffix}", LAYOUT, 4, GRID)
    if suffix == ".html":
        text = out.read_text(encoding="utf-8")
        assert "<title>\\udcff\\x1b[2J \u00e9$x_{y</title>" in text and "\x1b" not in text


@pytest.mark.parametrize("kept", [None, Pruning(0.25)])
def test_a_page_of_50_frames_is_small_and_no_wider_than_a_phone(kept, tmp_path):
    """Of noise, which no picture is harder to write than. That it scrolls only downwards was seen in a browser of 390
    pixels; here, that nothing has a width of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 135, 240, 3), np.uint8)
    folder = tmp_path / "noise"
    folder.mkdir()
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    text = render(folder, tmp_path / "a.html", kept=kept).read_text()
    assert len(text) < 2_000_000 and text.count("data:image/jpeg") >= 50
    shown = next(a["src"] for tag, a in Page(text).tags if tag == "img")
    assert np.abs(to_array(base64.b64decode(shown.partition(",")[2])).astype(int) - noise[0]).mean() < 60
    assert 'content="width=device-width' in text
    assert not re.findall(r"minmax\((?!min\()|(?<!-)\bmin-width: *[1-9]|(?<![-\w])width: *\d+px", text)


def test_a_page_without_pillow_has_png(clip, tmp_path, monkeypatch):
    report = gather(open_video(clip), LAYOUT, 10, GRID)
    monkeypatch.setitem(sys.modules, "PIL", None)
    html.write(report, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "data:image/png" in text and "data:image/jpeg" not in text


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
    ("out", "message"), [("a.jpg", "end in .png or .html"), ("clip/0.png/a.png", "is not a folder")]
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_half_written(error, clip, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def fail(report, path):
        path.write_text("half")
        raise error

    monkeypatch.setattr(html, "write", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        render(clip, tmp_path / "a.html", LAYOUT, 4, GRID)
    assert sorted(tmp_path.iterdir()) == before


KEPT = [0, 1, 9, 96 + 31, 128 + 4 * 3 + 2]  # of 4 slow frames of 32 tokens, and 10 fast ones of 4


def test_kept_tokens_are_lit_and_the_others_dim(clip):
    report = gather(open_video(clip), LAYOUT, 10, GRID, KEPT)
    slow, fast = (view.pruned for view in report.pathways)
    assert [slow.count(frame) for frame in range(4)] == ["3 of 32", "0 of 32", "0 of 32", "1 of 32"]
    assert slow.text == "4 of 128 tokens kept" and fast.text == "1 of 40 tokens kept"
    assert report.budget == "5 of 168 video tokens" and report.saving.startswith("0.8% of the 640 patches")
    want = [("slow 4 of 128 (76%)", 4 / 128), ("fast 1 of 40 (24%)", 1 / 40)]
    assert [(share.label, share.kept) for share in report.shares()] == want
    # Frames of 48 x 80 are 8 x 8 patches of 6 x 10; token 9 is in the third row of slow tokens, 4 in a row, 1 x 2 each.
    lit = np.zeros((48, 80), bool)
    lit[0:6, 0:40] = lit[12:18, 20:40] = True
    tile, frame = slow.tiles[0], report.thumbs[0]
    assert (tile == frame).all(2)[lit].all() and (np.abs(tile.astype(int) - frame).min(2)[~lit] > 50).all()
    lit[:] = False
    lit[24:, :40] = True
    tile, frame = fast.tiles[3], report.thumbs[3]
    assert (tile == frame).all(2)[lit].all() and (np.abs(tile.astype(int) - frame).min(2)[~lit] > 50).all()
    assert (np.abs(slow.tiles[1].astype(int) - report.thumbs[2]) > 50).all()


def test_pruning_by_pixels_keeps_what_moves(tmp_path):
    folder = tmp_path / "passing"
    folder.mkdir()
    background = np.random.default_rng(0).integers(0, 100, (64, 64, 3), np.uint8)
    for number in range(6):
        pixels = background.copy()
        if number in (2, 3):
            pixels[40:48, 8:16] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    report = gather(open_video(folder), "pool:each,each,each,max", 6, GRID, Pruning(below=0.9))
    (view,) = report.pathways
    assert report.indices == [0, 1, 2, 2, 3, 4]
    # It comes in the third of these, and what was behind it is back in the last.
    assert np.argwhere(view.pruned.tokens[1:]).tolist() == [[1, 41], [4, 41]] and view.pruned.tokens[0].all()
    assert report.notes == "prune:below0.9:similarity, by the patches' pixels"
    with pytest.raises(InputError, match="needs the language model"):
        gather(open_video(folder), LAYOUT, 6, GRID, Pruning(4, "attention"))


def test_a_kept_class_token_and_a_kept_canvas(clip):
    token, pool = gather(open_video(clip), "videollm_online", 2, GRID, [10, 11]).pathways
    assert [token.pruned.count(frame) for frame in (0, 1)] == ["0 of 1", "1 of 1"]
    assert token.pruned.tiles[1].min() < 100 < 190 < token.pruned.tiles[0].min()
    assert [pool.pruned.count(frame) for frame in (0, 1)] == ["0 of 9", "1 of 9"]
    (view,) = gather(open_video(clip), "ig_vlm", 8, GRID, range(64)).pathways
    height, width = view.pruned.tiles.shape[1:3]
    assert width / height == pytest.approx(2 * 80 / (3 * 48), rel=0.02)  # two columns, three rows of frames
    assert view.pruned.count(0) == "64 of 64" and view.pruned.tiles[0].min() < 50 < view.pruned.tiles[1].min()


def test_pictures_of_pruned_tokens_are_whole(clip, tmp_path):
    pytest.importorskip("matplotlib")
    half = [*range(64), *range(128, 148)]
    pixels = to_array(render(clip, tmp_path / "a.png", LAYOUT, 10, GRID, kept=half).read_bytes())
    assert pixels.shape[1] == 1540 and (pixels[-20:] == 255).all() and (pixels[:, -30:] == 255).all()
    bar = 13.1 * 0.36 * 110**2
    for colour, share in zip(COLOURS, (64 / 168, 20 / 168)):
        assert 0.8 * share * bar < covered(colour, pixels) < 2.2 * share * bar
    text = render(clip, tmp_path / "a.html", LAYOUT, 10, GRID, kept=half).read_text()
    page = Page(text)
    assert page.open == [] and "84 of 168 video tokens" in text and text.count("slow 64 of 128 (76%)") == 3
    tiles = [to_array(base64.b64decode(a["src"].partition(",")[2])) for tag, a in page.tags if tag == "img"]
    assert len(tiles) == 10 + 4 + 10 and text.count(" of 32</span>") == 4 and text.count(" of 4</span>") == 10
    assert tiles[10].max() < 200 < tiles[13].min()  # the first slow frame is lit, the last is not


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_drawn_pruned(name, clip, tmp_path):
    text = render(clip, tmp_path / "a.html", name, 9, GRID, kept=Pruning(0.25)).read_text()
    assert Page(text).open == []
    report = gather(open_video(clip), name, 9, GRID, Pruning(0.25))
    separators = len(report.plan.separator_rows)
    assert report.stays.sum() == separators + -(-(report.total - separators) // 4)
    assert all(share.kept == 1 for share in report.shares() if share.colour in SEPARATORS)
    assert f"{report.stays.sum():,} of {report.total:,} video tokens" in text


@pytest.mark.parametrize("kept", [[], [168], [-1], [[0, 1]]])
def test_bad_kept(kept, clip, tmp_path):
    with pytest.raises(InputError, match="positions among the 168 tokens"):
        render(clip, tmp_path / "a.html", LAYOUT, 10, GRID, kept=kept)
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_a_name_that_is_not_utf8(suffix, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.rename(tmp_path / "1.png", path)
    assert render(path, tmp_path / f"x.{suffix}").stat().st_size > 1000
