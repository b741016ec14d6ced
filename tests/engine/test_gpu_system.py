"""The whole system on a GPU: the same answers as on the CPU, from captured decode steps, in batches, after faults."""

import pytest
import torch
from tiny_engine import LAYOUT, QUESTION, Clip

from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import OutOfMemoryError
from sfllava_fast.model.attention import resolve_attention
from sfllava_fast.video.pixels import load_pixels
from sfllava_fast.video.preprocess import preprocess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found"),
]
QUESTIONS = [QUESTION, "Where does it go, and why so slowly?", "Is it red?"]
ASK = {"max_new_tokens": 24}
# float32 on both devices, so that no token hangs on a rounding.
FLOAT32 = {"dtype": "float32"}


@pytest.fixture(params=["vicuna", "mistral", "rescaled rope"])
def pair(load, request):
    """The same checkpoint on the CPU and on the GPU."""
    family = "mistral" if request.param == "mistral" else "vicuna"
    settings = {"text": {"max_position_embeddings": 4096}} if request.param == "rescaled rope" else {}
    return [load(family, options=FLOAT32 | {"device": device}, **settings) for device in ("cpu", "cuda")]


def test_a_session_answers_as_on_the_cpu_from_a_captured_step(pair):
    on_cpu, on_gpu = (model.open(Clip(), frames=9) for model in pair)
    expected = [on_cpu.ask(question, **ASK).token_ids for question in QUESTIONS * 2]
    assert [on_gpu.ask(question, **ASK).token_ids for question in QUESTIONS * 2] == expected
    assert on_gpu._cache.step.graph is not None


def test_one_answer_after_another_uses_the_captured_step(pair):
    on_cpu, on_gpu = pair
    for total in (20, 9, 20):
        answers = [model.answer(Clip(total), QUESTION, frames=9, **ASK).token_ids for model in pair]
        assert answers[0] == answers[1]
    assert on_gpu.pipeline.sessions.spare.step.graph is not None and on_cpu.pipeline.sessions.spare.step is None


def test_a_batch_answers_as_each_alone(pair):
    asked = [(Clip(7), QUESTIONS[0]), (Clip(20), QUESTIONS[1]), (Clip(7), QUESTIONS[2])]
    together = pair[1].answer_batch(asked, frames=9, max_new_tokens=24)
    assert [answer.token_ids for answer in together] == [
        pair[0].answer(clip, question, frames=9, **ASK).token_ids for clip, question in asked
    ]


def test_positions_that_are_rescaled_are_not_captured(load):
    """Beyond 4096 tokens the rotary embedding looks at positions, which a capture cannot."""
    answers = []
    for device in ("cpu", "cuda"):
        model = load(options=FLOAT32 | {"device": device}, text={"max_position_embeddings": 4096})
        model = model.with_layout("slowfast-slow_56frms_concat-fast_6x6")  # 4032 tokens
        session = model.open(Clip(56), frames=56)
        answers.append([session.ask(QUESTION * n, max_new_tokens=8).token_ids for n in (1, 30, 1)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exact", "commuted", "auto"])
def test_16_bit_models_answer_in_every_projector_mode(load, dtype, mode):
    model = load(options={"device": "cuda", "dtype": dtype, "projector": mode})
    with model.open(Clip(), frames=9) as session:
        first = session.ask(QUESTION, **ASK)
        assert session.ask(QUESTION, **ASK).token_ids == first.token_ids
    assert model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids == first.token_ids


def test_the_embedded_model_answers_alike():
    pytest.importorskip("av")
    from sfllava_fast import embedded

    clip, questions = embedded.sample_video(), embedded.sample_questions()
    told = []
    for device in ("cpu", "cuda"):
        session = SlowFastLlava.from_pretrained(device=device, dtype="float32").open(clip)
        told.append([session.ask(question).text for question in questions])
    assert told[0] == told[1]


def test_sdpa_names_a_kernel_that_was_measured():
    chosen = resolve_attention("sdpa", "cuda", torch.bfloat16)
    assert chosen.describe() in ("sdpa (flash, cuda)", "sdpa (cudnn, cuda)")
    assert "(prefill: flash " in chosen.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_of_the_cpu(load, dtype):
    spec = load().pipeline.encoder.preprocess_spec
    clip, frames = Clip(), [0, 3, 3, 19, 7]
    with load_pixels(clip, frames, spec, dtype, "cuda", 2) as pixels:
        made = torch.cat(list(pixels))
    expected = preprocess(clip.frames(frames), spec, torch.float32)
    assert made.is_cuda and made.dtype is dtype
    level = spec.rescale / min(spec.std)  # one of 255
    near = 1.01 * level + (0 if dtype is torch.float32 else 0.02)
    assert (made.cpu().float() - expected).abs().max() <= near


def test_a_session_survives_running_out_of_memory(load):
    model = load(options={"device": "cuda", "dtype": "bfloat16"})
    session = model.open(Clip(), frames=9)
    expected = session.ask(QUESTION, **ASK).token_ids
    room = 50 << 30  # more tokens than any GPU holds
    with pytest.raises(OutOfMemoryError, match=r"out of memory on cuda:0 in stage prefill \(asked for .*iB\): take"):
        model.pipeline.language.config.max_position_embeddings = model.checkpoint.__dict__["context"] = room
        session.ask(QUESTION, max_new_tokens=room - 1000)
    assert session.ask(QUESTION, **ASK).token_ids == expected
    assert str(model.layout) == LAYOUT
