"""The reductions' benchmark: its arithmetic, what it checks before it times, a whole run on tiny shapes."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
pytest.importorskip("transformers")
from gpu_stand_in import FakeCuda
from transformers import LlamaConfig

from bench import __main__ as cli
from bench.gpu import run as gpu
from bench.harness.compare import compare
from bench.harness.record import passes, read_result, write_json
from bench.harness.timers import CpuTimer, CudaTimer
from bench.pipeline import costs, dummy
from bench.reduction import cost, first_logits, mixture_prefill, row_kernels
from bench.reduction.first_logits import FirstLogits, ask
from bench.reduction.mixture_prefill import MIXED, PLAIN, RATIO, RATIOS, SWEPT, Mixed, MixturePrefill, prefill_mixed
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.rows import gather_rows_of, scatter_rows, top_per_frame
from sfllava_fast.ops.token_offsets import token_frames
from sfllava_fast.reduction.mixture import mixed_layer as routing  # defines the op

TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=8)
FRAMES = (5, 15, 25, 29, 33)  # two frames of 10 tokens, two of 4
TOKENS = FRAMES[-1] + 7
HELD = f"{SWEPT} {RATIO}"  # whose bars are the issue's


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(mixture_prefill, "GRID", (8, 8))
    monkeypatch.setattr(mixture_prefill, "FRAMES", 10)
    monkeypatch.setitem(cost.PREFILLS, "cpu", MixturePrefill("tiny", TINY, torch.float32))
    monkeypatch.setitem(cost.QUESTIONS, "cpu", FirstLogits("tiny", torch.float32))
    monkeypatch.setattr(row_kernels, "WIDTH", 64)
    monkeypatch.setattr(row_kernels, "HEADS", 4)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return cli.main()


# --- FLOP

OWN = {torch.ops.sfllava_fast.attention_received: lambda q, k, *_, out_shape: 2 * math.prod(q) * k[2]}


@pytest.mark.parametrize(
    "mixed, kv_heads",
    [
        *((mixed, 4) for mixed in MIXED if mixed.ratio in (1, RATIO)),
        (Mixed(SWEPT, 0.55), 2),
        (Mixed("norm", 0.1), 2),
    ],
    ids=str,
)
def test_flop_by_torchs_own_counter(mixed, kv_heads):
    """The counter knows the CPU's fused attention not at all (it counts 0), and of the unfused one the whole square; of
    our own op it has to be told."""
    decoder = mixture_prefill.dummy_decoder(
        TINY | {"num_key_value_heads": kv_heads}, torch.device("cpu"), torch.float32
    )
    embeds = torch.randn(1, TOKENS, 64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=OWN) as counter:
        _, cache = prefill_mixed(*mixed.wrap(decoder), embeds, FRAMES)
    counts, bmm = counter.get_flop_counts(), torch.ops.aten.bmm
    squares = [counts[f"LlamaModel.layers.{number}.self_attn"][bmm] for number in range(4)]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    causal = sum(square * (n + 1) // (2 * n) for square, n in zip(squares, lengths))
    angles = sum(counts.get("LlamaModel.rotary_emb", {}).values())
    expected = {"products": counter.get_total_flops() - sum(squares) - angles, "attention": causal}
    assert mixture_prefill.flop(decoder.config, mixed, FRAMES, TOKENS) == expected


def test_the_flop_asked_for_is_a_matter_of_shapes(monkeypatch):
    """SF-LLaVA's prompt in the shapes that are measured, by every scorer: FLOP over those of the plain model."""
    for work in (cost.PREFILLS["cpu"], cost.PREFILLS["cuda"]):
        text = LlamaConfig(**work.shape if isinstance(work.shape, dict) else dummy.SHAPES[work.shape][1])
        frames = token_frames(SlowFastLayout().plan(50, (24, 24)), 35)
        tokens = frames[-1] + 25
        assert tokens == 3740 and frames[-1] - frames[0] == 3680
        whole = sum(mixture_prefill.flop(text, Mixed(SWEPT, 1.0), frames, tokens).values())
        assert whole == costs.prefill(text, tokens, 0, 4).flop
        shares = [sum(mixture_prefill.flop(text, mixed, frames, tokens).values()) / whole for mixed in MIXED]
        assert all(share <= 0.65 for share, mixed in zip(shares, MIXED) if mixed.ratio == RATIO)
        assert shares[: len(RATIOS)] == sorted(shares[: len(RATIOS)], reverse=True)


# --- what is checked before anything is timed


def last_of_each(scores, frames, ratio):
    return top_per_frame(-scores, frames, ratio)


def unmoved(tensors, index):
    """Right for hidden states, not for the angles of their positions."""
    hidden, *rotary = tensors
    return [*gather_rows_of([hidden], index), *(part[:, : index.shape[1]] for part in rotary)]


def nearly(hidden, index, rows, weights):
    return scatter_rows(hidden, index, rows) + 1e-3


SPOILED = {"top_per_frame": last_of_each, "gather_rows_of": unmoved, "scatter_rows": nearly}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_mixture_is_not_timed(tiny, monkeypatch, capsys, name):
    monkeypatch.setattr(routing, name, SPOILED[name])
    monkeypatch.setattr(CpuTimer, "times", None)
    assert main(monkeypatch, "reduction", "--rounds", "2", "--only", "prefill") == 1
    assert "error: prefill tiny float32: AssertionError: Tensor-likes are not close" in capsys.readouterr().out


def test_all_tokens_must_be_the_plain_models_bits(tiny, monkeypatch, capsys):
    right = mixture_prefill.prefill_mixed
    monkeypatch.setattr(mixture_prefill, "prefill_mixed", lambda *a: (right(*a)[0] * (1 + 1e-6), right(*a)[1]))
    assert main(monkeypatch, "reduction", "--rounds", "2", "--only", "prefill") == 1
    assert "learned 1.0 differs from the plain model" in capsys.readouterr().out


@pytest.mark.parametrize("reduction", ["plain", "mixture:1", "prune:1.0", "compress:4"])
def test_a_question_with_other_logits_is_not_timed(tiny, monkeypatch, capsys, reduction):
    def spoiled(prefilling, *arguments):
        logits, cache = ask(prefilling, *arguments)
        spoils = (prefilling.label or PLAIN).startswith(reduction.removesuffix(":4"))
        return logits + 1e-2 * spoils, cache

    monkeypatch.setattr(first_logits, "ask", spoiled)
    assert main(monkeypatch, "reduction", "--rounds", "2", "--only", "question") == 1
    assert f"error: question tiny float32: AssertionError: {reduction}: logits are off" in capsys.readouterr().out


def test_kernels_of_other_rows_are_not_timed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(row_kernels.rows, "gather_rows", lambda hidden, index: hidden[:, : index.shape[1]])
    assert main(monkeypatch, "reduction", "--rounds", "2", "--only", "gather_rows") == 1
    assert capsys.readouterr().out.count("error: gather_rows") == 2


# --- a whole run


def test_a_whole_run(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    written, picture = tmp_path / "reduction.json", tmp_path / "reduction.png"
    assert main(monkeypatch, "reduction", "--rounds", "2", "--json", written) == 0
    out, result = capsys.readouterr().out, read_result(written)
    assert result["kind"] == "reduction" and result["machine"]["commit"] and not result["errors"]
    assert list(result["works"]) == ["prefill tiny float32", "question tiny float32", *map(str, row_kernels.WORKS)]
    work = result["works"]["prefill tiny float32"]
    assert (work["tokens"], work["vision_tokens"]) == (540, 10 * 32 + 10 * 16)
    assert list(work["providers"]) == [PLAIN, *map(str, MIXED)]
    compiled = backends.BACKENDS["cpu"].why_unavailable(None) is None  # else rows are moved by PyTorch's operators
    kept = 60 + 10 * 7 + 10 * 4  # a fifth of each frame, rounded up
    a_token = 2 * 64 * 4  # bytes of a layer's keys and values
    held = {name: row["cache_bytes"] for name, row in work["providers"].items()}
    assert held[PLAIN] == held[f"{SWEPT} 1.0"] == 4 * 540 * a_token
    assert held[HELD] == held["norm 0.2"] == (2 * 540 + 2 * kept) * a_token
    for name, row in work["providers"].items():
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["ratio"] > 0 and name in out
    for name in (PLAIN, HELD):
        spent = work["providers"][name]["parts_ms"]
        rows_ms = spent.pop("choosing and moving rows")
        assert (rows_ms > 0) == (name == HELD and compiled) and set(spent) == {"products", "attention", "rest"}
        assert min(spent.values()) > 0
    assert all(f"{scorer} 0.2: 0.75 of plain's time" in work["bars"] for scorer in (SWEPT, *mixture_prefill.OTHERS))
    asked = {name: row["cache_bytes"] for name, row in result["works"]["question tiny float32"]["providers"].items()}
    assert asked["plain"] == 2 * 540 * a_token and asked["mixture:0.2:norm"] == (540 + kept) * a_token
    assert asked["prune:0.2"] == asked["prune:0.2:attention"] == 2 * (60 + 96) * a_token
    peaks = {name: row["peak_bytes"] for name, row in work["providers"].items()}
    assert peaks[PLAIN] == peaks[f"{SWEPT} 1.0"] > peaks[HELD] > held[HELD]
    assert asked["compress:4"] == 2 * (60 + 4) * a_token
    assert not any(change.regressed for change in compare(result, result, 0.1))
    assert main(monkeypatch, "plot", written, "--out", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 80_000
    assert main(monkeypatch, "plot", written, written) == 2
    write_json(written, result | {"works": {}})
    assert main(monkeypatch, "plot", written) == 2 and "no prefill is in this result" in capsys.readouterr().err


def test_the_work_on_a_gpus_clock(tiny, monkeypatch):
    monkeypatch.setattr(mixture_prefill, "MIXED", (Mixed(SWEPT, 1.0), Mixed(SWEPT, RATIO)))
    monkeypatch.setattr(CudaTimer, "_WARM_UP", 0)
    fake = FakeCuda()
    found = cost.PREFILLS["cpu"].measure("cpu", CudaTimer(fake), 3)
    assert fake.log.count("event") == 2 * 3 * (3 + 0)
    assert set(found["providers"]) == {PLAIN, f"{SWEPT} 1.0", HELD}


def test_on_a_gpu_it_is_a_step_of_the_pipelines_part(tmp_path):
    found = {step.name: step for step in gpu.PARTS["pipeline"](tmp_path, "90", 4)}["reduction"]
    args = cli.make_parser().parse_args(found.command[3:])
    assert args.device == "cuda" and args.json == tmp_path / "reduction.json" and found.command[3] == "reduction"
    work = cost.PREFILLS["cuda"]
    assert (work.shape, work.dtype) == ("7b", torch.bfloat16)


# --- bars


def rows_of(ratio, flop, peak):
    """Rows of a result. flop, peak: the mixed model's of the plain one's 1000."""

    def row(ratio, flop, peak):
        return {"ratio": ratio, "flop": {"products": flop - 9, "attention": 9}, "cache_bytes": 1, "peak_bytes": peak}

    return {PLAIN: row(1.0, 1000, 1000), "learned 1.0": row(1.1, 1000, 1000), HELD: row(ratio, flop, peak)}


@pytest.mark.parametrize(
    "ratio, flop, peak, reached",
    [
        (0.75, 650, 800, (True, True, True)),
        (0.76, 650, 800, (False, True, True)),
        (0.75, 651, 800, (True, False, True)),
        (0.75, 650, 801, (True, True, False)),
    ],
)
def test_bars(ratio, flop, peak, reached):
    found = mixture_prefill.bars(rows_of(ratio, flop, peak), mixture_prefill.BARS["cpu"])
    asked = ("0.75 of plain's time", "0.65 of plain's FLOP", "0.8 of plain's peak memory")
    assert list(found) == [f"{HELD}: {limit}" for limit in asked]
    assert tuple(bar["ratio"] >= bar["bar"] for bar in found.values()) == reached
    assert passes({"works": {"prefill": {"bars": found}}}, 1) == all(reached)
