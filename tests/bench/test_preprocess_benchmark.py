"""pytest-benchmark of preprocessing on one core, beside the published way: pytest bench --benchmark-enable -s."""

import statistics
import time

import numpy as np
import pytest
import torch

from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

pytest.importorskip("pytest_benchmark")
Image = pytest.importorskip("PIL.Image")
processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

FRAMES, ROUNDS = 50, 9


@pytest.mark.parametrize("side", [96, 336])
def test_720p_frames(benchmark, side):
    if not benchmark.enabled:
        pytest.skip("measures; needs --benchmark-enable")
    processor = processors.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (FRAMES, 720, 1280, 3), np.uint8))

    def published():
        images = (Image.fromarray(f).resize((side, side), Image.Resampling.BICUBIC) for f in frames.numpy())
        return torch.cat([processor.preprocess(i, return_tensors="pt")["pixel_values"] for i in images])

    spec, seconds, allowed = PreprocessSpec.from_processor(processor), [], torch.get_num_threads()

    def before_each_round():
        start = time.perf_counter()
        published()
        seconds.append(time.perf_counter() - start)

    torch.set_num_threads(1)
    try:
        preprocess(frames, spec)
        benchmark.pedantic(preprocess, (frames, spec), setup=before_each_round, rounds=ROUNDS)
    finally:
        torch.set_num_threads(allowed)
    ratio = statistics.median(seconds) / benchmark.stats.stats.median
    benchmark.extra_info["times as fast as the published way"] = ratio
    print(f"\n{FRAMES} frames of 720p to side {side}, one core: {ratio:.1f} times as fast as the published way")
