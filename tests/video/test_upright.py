"""Frames as every player shows them: turned and mirrored by display matrices, and by EXIF."""

from __future__ import annotations

import clips
import numpy as np
import pytest

from sfllava_fast.errors import VideoError
from sfllava_fast.video import open_live, open_video

pytest.importorskip("av")
FLIPS = [(), ("-display_hflip",), ("-display_vflip",), ("-display_hflip", "-display_vflip")]
TURNS = [(), *(("-display_rotation", str(angle)) for angle in (90, 180, 270))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("upright")


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_a_display_matrix(flip, turn, folder, tmp_path):
    path = tmp_path / "phone.mp4"
    clips.ffmpeg(*turn, *flip, "-i", clips.make(folder, "plain.mp4"), "-c", "copy", path)
    size = (clips.WIDTH, clips.HEIGHT) if "90" in turn or "270" in turn else (clips.HEIGHT, clips.WIDTH)
    truth = clips.truth(path, size)
    video = open_video(path)
    assert video.size == size
    assert np.abs(video.arrays([0, 7]).astype(int) - truth[[0, 7]]).mean() < 2
    with open_live(path, 1) as live:
        assert np.abs(live.next_array()[1].astype(int) - truth[0]).mean() < 2


def test_decord_refuses_what_it_would_not_mirror(folder, tmp_path):
    pytest.importorskip("decord")
    path = tmp_path / "phone.mp4"
    clips.ffmpeg("-display_hflip", "-i", clips.make(folder, "plain.mp4"), "-c", "copy", path)
    with pytest.raises(VideoError, match="decord does not mirror .*, which .*phone.mp4 requires; use --decoder pyav"):
        open_video(path, "decord")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_with_exif_alone_and_in_a_folder(orientation, tmp_path):
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    y, x = np.mgrid[:32, :48]
    picture = Image.fromarray(np.stack([x * 5, y * 7, 0 * x], axis=2).astype(np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "1.jpg"
    picture.save(path, exif=exif, quality=95, subsampling=0)
    with Image.open(path) as image:
        truth = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    for video in (open_video(path), open_video(tmp_path)):
        assert video.size == truth.shape[:2]
        assert np.abs(video.arrays([0])[0] - truth).max() <= 6
