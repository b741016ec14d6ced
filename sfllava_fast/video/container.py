"""Containers and their video streams, opened with PyAV, versions 14.1 to 19."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..errors import VideoError
from .base import check_pixels, max_pixels, reason

# Only formats that contain pictures themselves: other formats of FFmpeg are lists of files, devices or code.
FORMATS = (
    "3g2,3gp,apng,asf,avi,av1,avs2,avs3,bmp_pipe,cavsvideo,dds_pipe,dirac,dnxhd,dpx_pipe,dv,evc,exr_pipe,flic,flv,gif,"
    "gif_pipe,gxf,h261,h263,h264,hdr_pipe,hevc,ico,ivf,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_anim,jpegxl_pipe,live_flv,"
    "m4v,matroska,mjpeg,mjpeg_2000,mov,mp4,mpeg,mpegts,mpegvideo,mpjpeg,mxf,nut,obu,ogg,pam_pipe,pbm_pipe,pcx_pipe,"
    "pgm_pipe,pgmyuv_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,rm,sgi_pipe,sunrast_pipe,swf,tiff_pipe,vc1,vvc,webm,"
    "webp_anim,webp_pipe,wtv,xbm_pipe,xpm_pipe,xwd_pipe,yuv4mpegpipe,"
    "aac,ac3,aiff,amr,caf,flac,mp3,w64,wav"  # audio, so that the error can name it
)
_GAPS = 10_000  # consecutive reads without a packet, at least 1 ms each, before giving up
_UNREADABLE_HERE = 22  # EINVAL: FFmpeg's error for a format that is not in the whitelist


@contextlib.contextmanager
def open_stream(av: Any, path: Path, threads: bool = True) -> Iterator[tuple[Any, Any]]:
    """Context of a file's container and video stream, decoded by several threads or by one.

    Raises:
        VideoError: If the file cannot be read, or as `picture_stream` does.
    """
    try:
        # A relative name may look like an FFmpeg protocol: 12:30.mp4.
        container = open_container(av, str(path.absolute()))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} is not a readable video: {why_unreadable(error)}") from error
    with container:
        stream = picture_stream(av, container, path)
        if threads:
            stream.thread_type = "AUTO"
        else:
            stream.codec_context.thread_count = 1
        yield container, stream


def open_container(av: Any, file: Any, formats: str = FORMATS, **options: Any) -> Any:
    """av.open, limited to `formats` and `max_pixels`.

    Metadata need not be UTF-8, for which versions before 19 need an option.
    """
    if int(av.__version__.split(".")[0]) < 19:
        options["metadata_errors"] = "ignore"
    limits = {"format_whitelist": formats, "max_pixels": str(max_pixels())}
    return av.open(file, **options | {"options": limits | options.get("options", {})})


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """container.demux that retries after EAGAIN, which FFmpeg returns when it finds no packet for a while."""
    gaps = 0
    while True:
        try:
            for packet in container.demux(stream):
                gaps = 0
                yield packet
            return
        except BlockingIOError:
            gaps += 1
            if gaps > _GAPS:
                raise
            time.sleep(0.001)


def frame_rate(stream: Any) -> Fraction | None:
    """Frames per second that a stream declares, or None."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else None


def picture_stream(av: Any, container: Any, name: object) -> Any:
    """The default video stream of a container; of several, the one with the largest pictures.

    Raises:
        VideoError: If there is no stream that can be decoded, or if its pictures exceed `max_pixels`.
    """
    kinds = av.stream.Disposition
    streams = [s for s in container.streams.video if not s.disposition & kinds.attached_pic]
    if not streams:
        kind = "only sound" if container.streams.audio else "no video stream"
        raise VideoError(f"{name} has {kind}: name a file with pictures")
    streams = [s for s in streams if s.codec_context]
    if not streams:
        raise VideoError(f"{name} uses a codec that PyAV cannot decode: re-encode it as H.264")
    stream = max(streams, key=lambda s: (bool(s.disposition & kinds.default), (s.width or 0) * (s.height or 0)))
    check_pixels(name, (stream.height or 0, stream.width or 0))
    stream.codec_context.options = {"max_pixels": str(max_pixels())}  # sizes may be unknown as yet, or change
    return stream


def why_unreadable(error: Exception) -> str:
    """The reason why a container could not be opened."""
    if getattr(error, "errno", None) == _UNREADABLE_HERE:
        return "it is in no format of videos or images that is read here (lists of files are not); re-encode it as MP4"
    return reason(error)


def instead_of_none(sized: bool) -> str:
    """Remedy for a video of which no frame can be decoded; sized: whether its header has the size of its pictures."""
    if sized:
        return "re-encode it"
    return f"re-encode it; or set SFLLAVA_FAST_MAX_PIXELS, if it has frames of more than {max_pixels()} pixels"
