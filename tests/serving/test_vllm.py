"""vLLM with our plugin against our own engine and stock transformers, on small random checkpoints: `make test-vllm`.

The plugin comes in through its entry point, as anywhere: the package must be installed beside vLLM.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import oracle
import pytest
import tiny_llava
import torch
from tiny_engine import Clip
from tiny_llava import SPECIALS, byte_tokenizer, write_checkpoint

from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.model.prompts import build_prompt, user_words
from sfllava_fast.ops.backends import reference
from sfllava_fast.ops.projector import project_and_aggregate
from sfllava_fast.serving import chat_template
from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm

IMAGE = SPECIALS.index("<image>")
SIDE, GRID = 96, (24, 24)  # as many patches as real checkpoints have
SETTINGS = dict(
    vision=dict(image_size=SIDE, patch_size=4, hidden_size=64, intermediate_size=64),
    # Head sizes and key/value heads that vLLM's attention and two ranks can take.
    text=dict(hidden_size=128, num_key_value_heads=2, max_position_embeddings=8192),
)
FRAMES = {"long": 60, "short": 20, "other": 35}
QUESTIONS = ("What is it?", "How many are there?")
NEW = 12
SMALL = dict(layout="slowfast-slow_4frms_spatial_2d_avg_pool-fast_3x2", frames=8)


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("next") / "model", "LlavaNextImageProcessor")


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "model", "CLIPImageProcessor", family="mistral")


def make_checkpoint(path, image_processor, family="vicuna"):
    from safetensors.torch import load_file, save_file
    from transformers import LlavaNextProcessor

    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    next_ = image_processor == "LlavaNextImageProcessor"
    write_checkpoint(path, family, next_, seed=8, **SETTINGS, **({"image_grid_pinpoints": pinpoints} if next_ else {}))
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    settings = tiny_llava.PREPROCESSOR | size | {"image_processor_type": image_processor}
    if next_:
        settings["image_grid_pinpoints"] = pinpoints
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = {"processor_class": LlavaNextProcessor.__name__ if next_ else "LlavaProcessor", "patch_size": 4}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (path / "processor_config.json").write_text(json.dumps(processor))
    # Sharper attention: else the answers hardly depend on the video, nor on the question.
    weights = load_file(path / "model.safetensors")
    for key, weight in weights.items():
        if "language_model" in key and "q_proj" in key:
            weight *= 6
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Encoded clips by name, and one that is cut short."""
    import av

    folder = tmp_path_factory.mktemp("videos")
    for name, total in FRAMES.items():
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25, width=40, height=30, pix_fmt="yuv420p")
            for picture in Clip(total).pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy())))
            container.mux(stream.encode())
    (folder / "broken.mp4").write_bytes((folder / "long.mp4").read_bytes()[:4000])
    return folder


def decode(path, count=50):
    """The frames sampled of a video, uint8 [n, H, W, 3], by means of neither vLLM nor the package."""
    import av

    with av.open(str(path)) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack([decoded[i] for i in oracle.sample_frames(len(decoded), count)])


class Stock:
    """The stock transformers model, its video tokens from the reference."""

    def __init__(self, path, layout=SlowFastLayout()):
        import transformers

        kind = json.loads((path / "config.json").read_text())["architectures"][0]
        self.model = getattr(transformers, kind).from_pretrained(path, dtype=torch.float32).eval()
        self.spec = PreprocessSpec.from_processor(json.loads((path / "preprocessor_config.json").read_text()))
        self.layout = layout

    @torch.no_grad()
    def video(self, pictures):
        states = self.model.model.vision_tower(preprocess(pictures, self.spec), output_hidden_states=True).hidden_states
        features = self.model.model.multi_modal_projector(states[-2][:, 1:])
        return reference.aggregate(features, self.layout.plan(len(pictures), GRID))

    @torch.no_grad()
    def logprobs(self, prompt, rows, answer):
        """[tokens of the answer, V] of the prompt's ids around the video's rows, and the answer so far."""
        before, after = (self.model.get_input_embeddings()(torch.tensor(ids)) for ids in prompt)
        said = self.model.get_input_embeddings()(torch.tensor(answer[:-1], dtype=torch.long))
        embeds = torch.cat([before, *rows, after, said])[None]
        return self.model(inputs_embeds=embeds).logits[0, -len(answer) :].log_softmax(-1)


@pytest.fixture(scope="module")
def start(videos):
    """Starts vLLM in this process; only the last one lives."""
    from vllm.distributed import cleanup_dist_env_and_memory

    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def start(checkpoint, architecture, limits=None, **entry):
        overrides = {"architectures": [architecture]} | ({"sfllava_fast": entry} if entry else {})
        return vllm.LLM(
            str(checkpoint),
            hf_overrides=overrides,
            dtype="float32",
            enforce_eager=True,
            distributed_executor_backend="uni",
            max_model_len=8192,
            max_num_batched_tokens=16384,
            allowed_local_media_path=str(videos),
            limit_mm_per_prompt=limits or {},
            mm_processor_cache_gb=0,  # the server below has it
        )

    yield start
    cleanup_dist_env_and_memory()
    patch.undo()


@pytest.fixture(scope="module")
def engine(start, next_checkpoint):
    return start(next_checkpoint, "SlowFastLlavaNextForConditionalGeneration")


@pytest.fixture(scope="module")
def stock(next_checkpoint):
    return Stock(next_checkpoint)


@pytest.fixture(scope="module")
def ours(next_checkpoint):
    return SlowFastLlava.from_pretrained(next_checkpoint)


def ask(question, *paths):
    parts = [{"type": "video_url", "video_url": {"url": f"file://{path}"}} for path in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def chat(engine, conversations, family="vicuna"):
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, logprobs=5)
    template = chat_template(family).read_text()
    return engine.chat(conversations, sampling, chat_template=template, use_tqdm=False)


def told(output):
    """{token id: log probability} of each step."""
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]


def forget(engine):
    """No video and no prompt is known any more."""
    engine.llm_engine.reset_encoder_cache()
    assert engine.reset_prefix_cache()


def assert_close(output, expected, tolerance=2e-3):
    assert list(output.outputs[0].token_ids) == expected.argmax(-1).tolist()
    for step, row in zip(told(output), expected, strict=True):
        for token, logprob in step.items():
            assert abs(logprob - row[token].item()) < tolerance


@pytest.mark.parametrize("name, placeholders", [("long", 3680), ("short", 3200), ("other", 2880 + 35 * 16)])
def test_tokens_are_those_of_our_engine_and_of_transformers(engine, ours, stock, videos, name, placeholders):
    path, prompt = videos / f"{name}.mp4", build_prompt(QUESTIONS[0], byte_tokenizer(), "vicuna")
    [output] = chat(engine, [ask(QUESTIONS[0], path)])
    assert output.prompt_token_ids == [*prompt.before, *[IMAGE] * placeholders, *prompt.after]
    answer = list(output.outputs[0].token_ids)
    assert answer == ours.answer(path, QUESTIONS[0], max_new_tokens=NEW).token_ids
    assert len(set(answer)) > 3, "a model that repeats itself shows nothing"
    pictures, sides = decode(path), (prompt.before, prompt.after)
    assert_close(output, stock.logprobs(sides, [stock.video(pictures)], answer))
    with pytest.raises(AssertionError):
        assert_close(output, stock.logprobs(sides, [stock.video(pictures.flip(0))], answer), tolerance=0.02)


def test_a_second_question_is_served_from_the_prefix_cache(engine, ours, videos):
    forget(engine)
    path = videos / "long.mp4"
    first, second = (chat(engine, [ask(question, path)])[0] for question in QUESTIONS)
    assert first.num_cached_tokens == 0 and second.num_cached_tokens >= 3680
    tokens = list(second.outputs[0].token_ids)
    assert tokens == ours.answer(path, QUESTIONS[1], max_new_tokens=NEW).token_ids
    assert tokens != list(first.outputs[0].token_ids)


def test_a_question_with_options_is_asked_as_our_engine_asks_it(engine, ours, videos):
    path, choices = videos / "short.mp4", ["a cat", "a dog"]
    prompt = build_prompt(QUESTIONS[0], byte_tokenizer(), "vicuna", choices)
    [output] = chat(engine, [ask(user_words(QUESTIONS[0], choices), path)])
    assert output.prompt_token_ids == [*prompt.before, *[IMAGE] * 3200, *prompt.after]
    expected = ours.answer(path, QUESTIONS[0], choices=choices, max_new_tokens=NEW).token_ids
    assert list(output.outputs[0].token_ids) == expected


def test_videos_of_several_lengths_go_through_in_one_launch(engine, videos, monkeypatch):
    conversations = [ask(QUESTIONS[0], videos / f"{name}.mp4") for name in FRAMES]
    alone = [list(chat(engine, [conversation])[0].outputs[0].token_ids) for conversation in conversations]
    forget(engine)
    launches = []

    def aggregate(*arguments, frame_offsets, **options):
        launches.append(frame_offsets)
        return project_and_aggregate(*arguments, frame_offsets=frame_offsets, **options)

    monkeypatch.setattr("sfllava_fast.serving.vllm_model.project_and_aggregate", aggregate)
    together = [list(output.outputs[0].token_ids) for output in chat(engine, conversations)]
    assert launches == [[0, 50, 70, 105]]
    assert together == alone
    assert len(set(map(tuple, alone))) == len(alone)


def test_two_videos_in_one_prompt(engine, stock, videos):
    names = ("short", "other")
    [output] = chat(engine, [ask(QUESTIONS[0], *(videos / f"{name}.mp4" for name in names))])
    prompt = build_prompt(QUESTIONS[0], byte_tokenizer(), "vicuna")
    rows = [stock.video(decode(videos / f"{name}.mp4")) for name in names]
    between = stock.model.get_input_embeddings()(torch.tensor([byte_tokenizer()("\n").input_ids[-1]]))
    answer = list(output.outputs[0].token_ids)
    assert_close(output, stock.logprobs((prompt.before, prompt.after), [rows[0], between, rows[1]], answer))


def test_frames_in_memory_are_sampled_alike(engine, ours, videos):
    pictures = decode(videos / "long.mp4", count=60)
    text = build_prompt(QUESTIONS[0], byte_tokenizer(), "vicuna").text
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW)
    request = {"prompt": text, "multi_modal_data": {"video": pictures.numpy()}}
    [output] = engine.generate(request, sampling, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == ours.answer(pictures, QUESTIONS[0], max_new_tokens=NEW).token_ids


def test_images_are_as_in_transformers(engine, next_checkpoint, stock):
    from PIL import Image
    from transformers import LlavaNextProcessor

    image = Image.fromarray(Clip(3).pictures[2].numpy()).resize((180, 90))
    processor, text = LlavaNextProcessor.from_pretrained(next_checkpoint), "USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    generated = stock.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    part = {"type": "image_pil", "image_pil": image}
    [output] = chat(engine, [[{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]])
    assert output.prompt_token_ids == inputs.input_ids[0].tolist()
    assert list(output.outputs[0].token_ids) == generated[0, inputs.input_ids.shape[1] :].tolist()


def test_requests_that_cannot_be_served(engine, videos):
    from PIL import Image

    mixed = ask(QUESTIONS[0], videos / "short.mp4")
    mixed[0]["content"].insert(0, {"type": "image_pil", "image_pil": Image.new("RGB", (30, 30))})
    with pytest.raises(ValueError, match="images or videos, not both"):
        chat(engine, [mixed])
    with pytest.raises(ValueError, match="video is cut short"):
        chat(engine, [ask(QUESTIONS[0], videos / "broken.mp4")])
    [output] = chat(engine, [ask(QUESTIONS[0], videos / "short.mp4")])
    assert len(output.outputs[0].token_ids) == NEW


@pytest.fixture(scope="module")
def server(next_checkpoint, videos):
    """The OpenAI-compatible server on two ranks: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = {"architectures": ["SlowFastLlavaNextForConditionalGeneration"]}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={next_checkpoint}"]
    command += [f"--port={port}", "--host=127.0.0.1", "--served-model-name=slowfast", "--tensor-parallel-size=2"]
    command += [f"--hf-overrides={json.dumps(overrides)}", f"--chat-template={chat_template('vicuna')}"]
    command += [f"--allowed-local-media-path={videos}", "--dtype=float32", "--enforce-eager", "--max-model-len=4608"]
    # The prefill of a video comes in chunks; requests may choose their frames.
    command += ["--max-num-batched-tokens=2048", "--trust-request-mm-kwargs"]
    # Without nobind, each rank wants a memory node of its own.
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (videos / "server.log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", process, Path(log.name))
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url, process, log):
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return urllib.request.urlopen(url, timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def post(server, url, **options):
    """(status, answer) of a question about the video at a URL."""
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    asked = {"model": "slowfast", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    body = json.dumps(asked | {"max_tokens": NEW, "return_token_ids": True} | options).encode()
    request = urllib.request.Request(f"{server}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def upload(path):
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_the_server_answers_on_two_ranks_as_our_engine_does(server, ours, videos):
    path = videos / "long.mp4"
    expected = ours.answer(path, QUESTIONS[0], max_new_tokens=NEW).token_ids
    for url in (upload(path), f"file://{path}"):
        status, answer = post(server, url)
        assert status == 200 and answer["choices"][0]["token_ids"] == expected
        assert answer["prompt_token_ids"].count(IMAGE) == 3680


def test_a_request_chooses_its_frames(server, ours, videos):
    path = videos / "long.mp4"
    status, answer = post(server, f"file://{path}", media_io_kwargs={"video": {"num_frames": 20}})
    assert status == 200 and answer["prompt_token_ids"].count(IMAGE) == 3200
    expected = ours.answer(path, QUESTIONS[0], frames=20, max_new_tokens=NEW).token_ids
    assert answer["choices"][0]["token_ids"] == expected


def test_bad_requests_get_400_and_the_server_lives_on(server, videos):
    file = f"file://{videos}/long.mp4"
    for url, settings, message in [
        (upload(videos / "broken.mp4"), {}, "the video is cut short"),
        ("data:video/mp4;base64,AAAA", {}, "the video is not a readable video"),
        (file, {"num_frames": 0}, "num_frames must be an integer of at least 1, not 0"),
        (file, {"fps": 2}, "unknown video options fps"),
        (file, {"num_frames": 60}, "3840 embedding tokens"),  # more than were provided for
    ]:
        status, answer = post(server, url, **({"media_io_kwargs": {"video": settings}} if settings else {}))
        assert status == 400 and message in answer["error"]["message"], answer
        assert "/" not in answer["error"]["message"], "nothing of the server's own files"
    assert post(server, f"file://{videos}/short.mp4")[0] == 200


def test_a_llava_1_5_checkpoint_with_its_own_layout_and_frames(start, plain_checkpoint, videos):
    # Images are not allowed, which leaves out the tower of a model that has no videos.
    engine = start(plain_checkpoint, "SlowFastLlavaForConditionalGeneration", limits={"image": 0}, **SMALL)
    path, prompt = videos / "long.mp4", build_prompt(QUESTIONS[0], byte_tokenizer("mistral"), "mistral")
    [output] = chat(engine, [ask(QUESTIONS[0], path)], "mistral")
    assert output.prompt_token_ids == [*prompt.before, *[IMAGE] * (4 * 144 + 8 * 6), *prompt.after]
    stock = Stock(plain_checkpoint, SlowFastLayout.parse(SMALL["layout"]))
    rows = stock.video(decode(path, SMALL["frames"]))
    answer = list(output.outputs[0].token_ids)
    assert_close(output, stock.logprobs((prompt.before, prompt.after), [rows], answer))
    ours = SlowFastLlava.from_pretrained(plain_checkpoint, SMALL["layout"])
    assert answer == ours.answer(path, QUESTIONS[0], SMALL["frames"], max_new_tokens=NEW).token_ids


def test_settings_are_checked_before_anything_is_loaded(start, plain_checkpoint):
    with pytest.raises(ValueError, match="name SlowFastLlavaForConditionalGeneration in --hf-overrides"):
        start(plain_checkpoint, "SlowFastLlavaNextForConditionalGeneration")
    with pytest.raises(ValueError, match="unknown layout"):
        start(plain_checkpoint, "SlowFastLlavaForConditionalGeneration", layout="slowfast-4x4")
