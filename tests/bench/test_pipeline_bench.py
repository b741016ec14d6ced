"""The pipeline's benchmark: its arithmetic, its baseline, a whole run on tiny shapes. Nothing that is timed counts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_llava import write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
pytest.importorskip("transformers")
from bench import __main__ as bench_cli
from bench.harness import peak_memory as memory
from bench.harness.compare import compare
from bench.harness.record import passes, read_result
from bench.pipeline import clip, costs, dummy, figures
from bench.pipeline import run as pipeline
from bench.pipeline.baseline import PlainAnswer
from bench.pipeline.figures import COMPILED, FROM_FRAMES, OURS, PLAIN, SECOND, STAGES, STEP, WITH_DECODING, Bars
from bench.pipeline.run import PipelinePair, Settings
from sfllava_fast import SlowFastLayout, slowfast_aggregate
from sfllava_fast.cli import main as cli
from sfllava_fast.engine.session import Session
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import InputError
from sfllava_fast.model import prompts
from sfllava_fast.model.generation import LanguageModel
from sfllava_fast.model.transformers_release import cache_argument, cache_in
from sfllava_fast.video import open_video
from sfllava_fast.video.preprocess import preprocess

FRAMES, NEW_TOKENS = 12, 5


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "small.mp4"
    clip.write_clip(path, total=30, size=(72, 128))
    return path


@pytest.fixture(scope="module")
def settings(video):
    return Settings(config="tiny", video=video, frames=FRAMES, new_tokens=NEW_TOKENS, rounds=2, device="cpu")


@pytest.fixture(scope="module")
def pair(settings, video):
    return PipelinePair.set_up(settings, video)


@pytest.fixture
def options(video):
    """The command line of a small run."""
    return [
        "--config",
        "tiny",
        "--device",
        "cpu",
        "--video",
        str(video),
        "--frames",
        str(FRAMES),
        "--new-tokens",
        str(NEW_TOKENS),
        "--rounds",
        "2",
    ]


def core(tower):
    return getattr(tower, "vision_model", tower)


# --- costs, against torch's own counter


def count(call):
    """FLOP by module and operator; eager attention, of which the counter knows every product."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_flop_counts()


@pytest.fixture(scope="module")
def eager():
    return dummy.dummy_checkpoint("tiny", "cpu", torch.float32, "eager")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_flop_and_weights_of_the_tower(eager, depth):
    checkpoint, whole = eager
    vision = checkpoint.model.config.vision_config
    tower = dummy.on_the_same_weights(whole)
    core(tower).encoder.layers = core(tower).encoder.layers[:depth]
    counts = count(lambda: tower(torch.zeros(4, 3, 112, 112)))
    assert costs.tower(vision, 4, depth, 1, 4).flop == sum(counts["Global"].values())
    norm = 2 * vision.hidden_size
    assert costs.tower_weights(vision, depth) + norm == sum(weight.numel() for weight in tower.parameters())


def test_flop_and_weights_of_the_projector(eager):
    checkpoint, _ = eager
    projector, plan = checkpoint.model.model.multi_modal_projector, SlowFastLayout().plan(6, (8, 8))
    cost = costs.projector(checkpoint.model.config, 1, plan, 2)
    assert cost.flop == sum(count(lambda: projector(torch.zeros(6, 64, 32)))["Global"].values())
    weights = sum(weight.numel() for weight in projector.parameters())
    assert cost.bytes == 2 * (weights + 6 * 64 * (32 + 64))


def language_flop(model, **inputs):
    """(linear layers, attention) of a forward pass; the angles of the rotary embedding are not counted."""
    counts = count(lambda: model(**inputs))
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    attention = counts["Global"].get(torch.ops.aten.bmm, 0) - rotary
    return sum(counts["Global"].values()) - rotary - attention, attention


@pytest.mark.parametrize("logits", [1, 0], ids=["last logits", "all logits"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flop_and_weights_of_the_language_model(kv_heads, logits):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(**dummy.SHAPES["tiny"][1] | {"num_key_value_heads": kv_heads}, attn_implementation="eager")
    model, tokens = LlamaForCausalLM(text).eval(), 20
    linear, attention = language_flop(model, inputs_embeds=torch.zeros(1, tokens, 64), logits_to_keep=logits)
    cost = costs.prefill(text, tokens, logits or tokens, 4)
    assert attention % (2 * tokens) == 0
    assert cost.flop == linear + attention * (tokens + 1) // (2 * tokens)  # the counter takes the whole square
    read = sum(w.numel() for w in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert costs.language_weights(text) == read
    cached = 2 * 2 * kv_heads * 16
    assert cost.bytes == 4 * (read + tokens * (64 + cached) + (logits or tokens) * 1024)

    output = model(inputs_embeds=torch.zeros(1, tokens, 64), use_cache=True)
    cache = cache_argument(model, cache_in(output))
    linear, attention = language_flop(model, input_ids=torch.tensor([[1]]), **cache, use_cache=True)
    step = costs.step(text, tokens + 1, 4)
    assert step == costs.Cost(linear + attention, 4 * (read + (tokens + 1) * cached))


def test_flop_that_a_videos_prefill_leaves_out(eager):
    """The counter's difference between a pass through every layer and one that stops at the last keys and values."""
    checkpoint, _ = eager
    language, tokens = LanguageModel(checkpoint.model, checkpoint.attention), 21
    text, embeds = language.config, torch.zeros(1, tokens, language.config.hidden_size)

    def passes(run):
        counts = count(lambda: run(language.new_cache(1, tokens), embeds))["Global"]
        return counts[torch.ops.aten.bmm], sum(counts.values()) - counts[torch.ops.aten.bmm]

    (all_attention, all_linear), (attention, linear) = passes(language._run), passes(language.prefill)
    square = all_attention - attention  # the counter takes the whole square, where a half is needed
    assert costs.unread(text, tokens) == all_linear - linear + square * (tokens + 1) // (2 * tokens)


def test_costs_of_the_issues_7b_by_the_known_figures():
    """About 19 TFLOP of CLIP, 1.2 of projector, 50 of prefill; the aggregator moves 266 MB."""
    config = dummy.make_config("7b")
    job = costs.Job(config, SlowFastLayout().plan(50, (24, 24)), (720, 1280), (23,), 60, 40, 3, 2)
    ours, plain = costs.ours(job), costs.plain(job)
    assert list(ours) == list(plain) == list(STAGES)
    assert ours["vision"].flop == pytest.approx(18.5e12, rel=0.05)
    assert ours["projector"].flop == pytest.approx(1.2e12, rel=0.02)
    assert ours["prefill"].flop == pytest.approx(50e12, rel=0.05) and ours["aggregate"].bytes == 266_076_160
    assert ours["preprocess"].bytes == 50 * 3 * (720 * 1280 + 2 * 336**2)
    assert ours["generate"] == costs.step(config.text_config, 3741, 2) + costs.step(config.text_config, 3742, 2)
    last_layer = costs.unread(config.text_config, 3700)
    assert plain["prefill"].flop - ours["prefill"].flop == 2 * 3739 * 4096 * 32064 + last_layer
    assert last_layer / plain["prefill"].flop == pytest.approx(0.73 / 32, rel=0.1)
    assert plain["vision"].flop / ours["vision"].flop == pytest.approx(24 / 23, rel=0.01)
    assert plain["vision"].bytes - ours["vision"].bytes > 24 * 50 * 577 * 1024 * 2
    assert all(plain[stage] == ours[stage] for stage in ("preprocess", "projector", "aggregate", "generate"))


# --- dummy checkpoints


@pytest.mark.parametrize("name, billions, family", [("7b", 7.06, "vicuna"), ("34b", 34.75, "chatml")])
def test_dummies_have_the_real_shapes(name, billions, family):
    from transformers import LlavaNextForConditionalGeneration

    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(dummy.make_config(name))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    tokenizer = dummy.make_tokenizer(family)
    prompt = prompts.build_prompt("What happens?", tokenizer, family)
    assert prompts.prompt_family("llama", None, tokenizer.get_vocab()) == family
    assert 40 < len(prompt) < 100 and (prompt.before[0] == 1) == (family == "vicuna")
    assert max(prompt.before + prompt.after) < 1024
    assert tokenizer.decode(prompt.after).endswith("In the video,")


def test_a_dummys_answer_hangs_on_question_and_video(pair, monkeypatch):
    """Else equal tokens would show nothing."""
    answers = [pair.ask_plain(question).token_ids for question in pair.questions]
    right = pair.plain.aggregate
    monkeypatch.setattr(pair.plain, "aggregate", lambda features: right(features.roll(1, 0)))
    answers += [pair.ask_plain(question).token_ids for question in pair.questions]
    assert len({tuple(ids) for ids in answers}) == 6 and all(len(set(ids)) > 2 for ids in answers)


def test_the_weights_are_shared_and_the_modules_are_not(pair):
    ours, plain = pair.ours.checkpoint.model.model, pair.plain.model.model
    assert ours.language_model is not plain.language_model
    theirs = {weight.data_ptr() for weight in plain.parameters()}
    assert all(weight.data_ptr() in theirs for weight in ours.parameters())
    assert len(core(plain.vision_tower).encoder.layers) == 3
    assert len(core(ours.vision_tower).encoder.layers) == 2


def test_a_checkpoints_whole_tower_is_loaded_for_the_plain_pipeline(tmp_path, settings):
    path = write_checkpoint(tmp_path / "model", vision_feature_layer=-2)
    checkpoint, tower = pipeline.load(replace(settings, config=None, model=str(path)))
    whole = core(tower)
    assert len(whole.encoder.layers) == 3
    cut = core(checkpoint.model.model.vision_tower).state_dict()
    assert cut and all(torch.equal(whole.state_dict()[name], weight) for name, weight in cut.items())


# --- the plain pipeline


def test_the_plain_pipeline_says_what_stock_generate_says(pair):
    answer = pair.ask_plain("What is it?")
    mask = torch.ones(answer.embeds.shape[:2], dtype=torch.long)
    stock = pair.plain.model.generate(
        inputs_embeds=answer.embeds, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert answer.token_ids == stock[0].tolist() and len(set(answer.token_ids)) > 2
    assert list(answer.seconds) == ["decode", *STAGES]
    logits = pair.plain.logits(answer, answer.token_ids)
    assert logits.argmax(dim=1).tolist() == answer.token_ids


def test_the_plain_pipeline_stops_where_ours_does(pair, monkeypatch):
    ids = pair.ask_plain("What is it?").token_ids
    monkeypatch.setattr(pair.ours.pipeline.prompts, "stop_ids", frozenset({ids[2]}))
    assert pair.ask_plain("What is it?").token_ids == ids[: ids.index(ids[2]) + 1]


def test_the_plain_stages_compute_what_ours_do(pair):
    plain, ours, pictures = pair.plain, pair.ours, pair.decoded.frames(pair.indices)
    with torch.inference_mode():
        pixels = plain.preprocess(pictures)
        last = 1 / 255 / 0.26
        assert (
            pixels - preprocess(pictures, ours.pipeline.encoder.preprocess_spec)
        ).abs().max() < 2.1 * last  # it enlarges
        patches = plain.encode(pixels)
        torch.testing.assert_close(patches, ours.pipeline.encoder.encode(pixels))
        tokens = plain.aggregate(patches)
        torch.testing.assert_close(tokens, slowfast_aggregate(patches.contiguous(), ours.layout))


def test_the_plain_tower_runs_whole_on_all_frames_at_once(pair):
    seen = []
    layers = core(pair.plain.model.model.vision_tower).encoder.layers
    handle = layers[-1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    pair.ask_plain("What is it?")
    handle.remove()
    assert seen == [FRAMES]


# --- the run


def test_a_whole_run(tmp_path, options, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    names = {"json": "pipeline.json", "plot": "pipeline.png", "trace": "trace.json"}
    files = {option: tmp_path / "out" / name for option, name in names.items()}
    written = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["bench", "pipeline", *options, *written, "--gate", "1"])
    assert bench_cli.main() == 0
    out = capsys.readouterr().out
    assert "3 questions are the plain pipeline's, token for token" in out

    result = read_result(files["json"])
    assert result["kind"] == "pipeline" and result["machine"]["commit"] and not result["errors"]
    assert result["settings"]["video_tokens"] == 10 * 32 + FRAMES * 16 and result["settings"]["random_weights"]
    assert list(result["works"])[:7] == ["decode", "wait", *STAGES][:7]
    assert {FROM_FRAMES, WITH_DECODING, SECOND, STEP} <= set(result["works"])
    for name, work in result["works"].items():
        assert name.split(",")[0][:10] in out
        peers = {"wait": set(), SECOND: set(), "aggregate": {PLAIN, COMPILED}}.get(name, {PLAIN})
        assert set(work["providers"]) == {OURS} | peers
        assert set(work["bars"]) >= {f"{OURS}: {peer}" for peer in peers}
        assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in work["providers"].values())
    rows = result["works"]["prefill"]["providers"]
    assert rows[PLAIN]["flop"] > rows[OURS]["flop"] > 0
    assert result["ceilings"]["gemm_flop_per_s"] > 0 and result["ceilings"]["copy_bytes_per_s"] > 0
    for name, tokens in {"aggregate": 512, FROM_FRAMES: 512, STEP: 1}.items():
        for row in result["works"][name]["providers"].values():
            assert row["tokens_per_s"] == pytest.approx(tokens / row["p50_ms"] * 1e3)
    assert "tokens/s" in out and f"aggregate, {COMPILED}" in out
    assert set(result["rates"]) == {"visual tokens/s of the aggregator", "prefill tokens/s", "decode tokens/s"}
    assert result["memory"][PLAIN]["weights_bytes"] > result["memory"][OURS]["weights_bytes"] > 0
    assert not any(change.regressed for change in compare(result, result, 0.1))

    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    monkeypatch.setattr(sys, "argv", ["bench", "plot", str(files["json"]), "--out", str(again)])
    assert bench_cli.main() == 0 and again.read_bytes() == files["plot"].read_bytes()
    events = json.loads(files["trace"].read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {f"sfllava_fast.{stage}" for stage in ("answer", "decode", *STAGES[1:])} <= names


def test_the_embedded_model_by_the_packages_own_command(video, capsys):
    options = ["--video", str(video), "--frames", "6", "--rounds", "2", "--device", "cpu"]
    assert cli.main(["bench", *options, "--question", "what does the sign say?"]) == 0
    assert "embedded, float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil",
    [lambda ids: [*ids[:2], ids[2] + 1, *ids[3:]], lambda ids: ids[:-1], lambda ids: []],
    ids=["another", "short", "empty"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_answer_fails_before_anything_is_timed(tmp_path, options, capsys, monkeypatch, spoil, dtype):
    right = SlowFastLlava.answer

    def wrong(self, *args, **kwargs):
        answer = right(self, *args, **kwargs)
        return replace(answer, token_ids=spoil(answer.token_ids))

    monkeypatch.setattr(SlowFastLlava, "answer", wrong)
    file = tmp_path / "pipeline.json"
    assert cli.main(["bench", *options, "--dtype", dtype, "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "WRONG: what does the sign say?" in out and "token for token" not in out
    result = read_result(file)
    assert len(result["errors"]) == 3 and FROM_FRAMES in result["works"]  # marked, and timed all the same


def test_near_ties_count_only_for_random_weights_of_16_bits(pair, settings, monkeypatch):
    """Logits of 4 and 4 less one or more units: in bfloat16 a unit is 1/128 of the logit."""
    plain = SimpleNamespace(token_ids=[5, 6])
    ours = SimpleNamespace(dtype=torch.bfloat16)

    def difference(ids, gap, new_tokens=2, **options):
        logits = torch.zeros(len(ids), 10)
        logits[0, 5] = logits[-1, 6] = 4
        logits[0, 7] = 4 - gap
        baseline = SimpleNamespace(logits=lambda answer, ids: logits, ends=lambda ids, most: len(ids) == new_tokens)
        own = replace(pair, ours=options.get("ours", ours), plain=baseline, settings=options.get("settings", settings))
        return own.difference(plain, ids)

    assert difference([5, 6], 0) == (None, 0)
    assert difference([7, 6], 0.1) == (None, 1)
    wrong = "token 0 is 7, 64.0 units of the last place below; the plain pipeline has 5"
    assert difference([7, 6], 2.0) == (wrong, 0)
    assert difference([7], 0.1)[0]  # an answer that stops too early is no tie
    assert difference([7, 6], 0.1, ours=SimpleNamespace(dtype=torch.float32))[0]
    assert difference([7, 6], 0.1, settings=replace(settings, config=None))[0]


def test_a_kept_videos_answers_are_compared_too(options, monkeypatch, capsys):
    right = Session.ask

    def wrong(self, question, *args, **kwargs):
        return right(self, "Another one?" if kwargs.get("clock") is None else question, *args, **kwargs)

    monkeypatch.setattr(Session, "ask", wrong)
    assert cli.main(["bench", *options]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == out.count("(the video kept)") == 3


def test_the_plain_first_token_comes_when_its_stages_end():
    seconds = dict(zip(("decode", *STAGES), (1, 2, 4, 8, 16, 32, 64)))
    assert PlainAnswer([1], seconds, torch.empty(0)).ttft == 63


# --- bars


def test_the_bars_are_those_asked_for(pair, settings):
    assert figures.BARS[("cpu", "embedded")] == Bars(from_frames=2.5, with_decoding=1.6)
    assert figures.BARS[("cpu", "small")] == Bars(five_questions=1.4)
    asked = {"second_share": 0.1, "five_questions": 1.4, "step_over_floor": 1.4, "extra_gb": 4}
    assert figures.BARS[("nvidia-h200", "7b")] == Bars(first_token_ms=138, first_token_hoped_ms=115, **asked)
    usual = Settings(device="cpu")
    assert replace(pair, settings=usual).bars() == Bars(from_frames=2.5, with_decoding=1.6)
    for other in (replace(usual, frames=8), replace(usual, config="tiny"), replace(usual, video=settings.video)):
        assert replace(pair, settings=other).bars() == Bars()


def test_limits_become_ratios_of_which_one_is_asked():
    def work(ours, **more):
        return {"providers": {OURS: {"p50_ms": ours}}, "bars": {f"{OURS}: {PLAIN}": {"bar": None, "ratio": 3.0}}} | more

    works = {FROM_FRAMES: work(80), WITH_DECODING: work(90)}
    works |= {SECOND: work(10, share=0.125, five_over_one=1.75), STEP: work(4, over_floor=1.75)}
    memory_ = {OURS: {"weights_bytes": 14_000_000_000, "peak_bytes": 20_000_000_000}}
    figures.set_bars(works, Bars(2.5, 1.6, 92, 0.1, 1.4, 1.4, 4, 80), memory_)
    ratios = {
        (name, bar): pair["ratio"]
        for name, work in works.items()
        for bar, pair in work["bars"].items()
        if pair["bar"] == 1
    }
    assert ratios == {
        (FROM_FRAMES, "ours: 92 ms"): pytest.approx(1.15),
        (FROM_FRAMES, "ours: weights + 4 GB"): pytest.approx(0.9),
        (SECOND, "ours: 0.1 of the first"): pytest.approx(0.8),
        (SECOND, "ours: 1.4 prefills for five questions"): pytest.approx(0.8),
        (STEP, "ours: 1.4 times its floor"): pytest.approx(0.8),
    }
    assert works[FROM_FRAMES]["bars"]["ours: plain"] == {"bar": 2.5, "ratio": 3.0}
    assert works[FROM_FRAMES]["bars"]["ours: 92 ms"]["stretch"] == pytest.approx(1.15)
    assert not passes({"works": works}, 1) and passes({"works": works}, 0.79)


# --- clip, memory


def test_the_drawn_clip_and_its_decoded_frames(video):
    opened = open_video(video)
    assert (opened.total, opened.size, opened.fps) == (30, (72, 128), clip.RATE)
    decoded = clip.DecodedVideo(opened, [3, 8, 20])
    every = decoded.frames([3, 8, 20])
    assert torch.equal(every, opened.frames([3, 8, 20]))
    assert decoded.frames([8, 20]).data_ptr() == every[1:].data_ptr()
    assert torch.equal(decoded.frames([20, 3]), every[[2, 0]])
    assert len(decoded.frames([])) == 0
    streamed = list(decoded.stream([20, 3]))
    assert [index for index, _ in streamed] == [3, 20] and streamed[1][1].data_ptr() == every[2].data_ptr()


def test_memory_of_a_call():
    tensor = torch.zeros(1000)
    assert memory.size([tensor, tensor[5:], torch.zeros(10)]) == 4040
    grown = memory.growth(torch.device("cpu"), lambda: torch.ones(25_000_000).sum())
    if grown is None:
        pytest.skip("this machine's kernel does not tell")
    assert 95e6 < grown < 150e6


# --- wrong input


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--config", "9b"], "argument --config: invalid choice: '9b'"),
        (["--config", "tiny", "--model", "x"], "not allowed with argument"),
        (["--model", "no/such/place"], "no checkpoint directory no/such/place"),
        (["--rounds", "1"], "rounds must be at least 2"),
        (["--video", "nothing.mp4"], "nothing.mp4 does not exist"),
        (["--config", "tiny", "--device", "abacus"], "unknown device 'abacus'"),
        (["--config", "tiny", "--layout", "pllava"], "the plain pipeline has no layout pllava"),
    ],
)
@pytest.mark.parametrize("main", ["bench pipeline", "sfllava-fast bench"])
def test_wrong_input_is_one_line(arguments, error, main, video, monkeypatch, capsys):
    arguments = arguments if "--video" in arguments else [*arguments, "--video", str(video)]
    if main == "bench pipeline":
        monkeypatch.setattr(sys, "argv", ["bench", "pipeline", *arguments])
        try:
            code = bench_cli.main()
        except SystemExit as done:
            code = done.code
    else:
        code = cli.main(["bench", *arguments])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error in line and "Traceback" not in line


def test_settings_say_what_does_not_go_together():
    with pytest.raises(InputError, match="leave --config out"):
        Settings(model="x", config="tiny")


def test_what_is_not_installed_is_one_line(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("sfllava_fast._bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["bench"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "pip install rich matplotlib" in line
