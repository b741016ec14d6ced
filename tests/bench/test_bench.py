"""The benchmark's own arithmetic and steps, without a GPU and without timing anything that counts."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sfllava_fast import SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends

pytest.importorskip("rich")
from gpu_stand_in import FakeCuda, pretend_a_device, rehearse

from bench import __main__ as cli
from bench import stream
from bench.gpu import carried, copies, sanitize, tune
from bench.gpu import run as gpu
from bench.harness import record, timers
from bench.harness.compare import compare
from bench.harness.compare import show as show_changes
from bench.harness.record import ROOT, ResultError, folder_name, processor, read_result
from bench.harness.tables import make_console
from bench.op import peers, works
from bench.op import report as op_report
from bench.op import roofline as plot
from bench.op import run as op
from bench.op.works import OpWork
from bench.paired import dropins, layouts, projector

COMMITTED = ROOT / "bench/results/cpu-amd-epyc-milan/op.json"
BFLOAT16 = torch.bfloat16


# --- works


@pytest.mark.parametrize(
    "work, expected",
    [
        (OpWork(BFLOAT16, 4096), 266_076_160),
        (OpWork(BFLOAT16, 1024, True), 66_519_040),
        (OpWork(torch.float32, 4096), 532_152_320),
        # 3680 tokens' gradients, 10 frames that a max chose from, 50 frames of gradient
        (OpWork(BFLOAT16, 4096, peers="none", backward=True), (3680 + 10 * 576 + 50 * 576) * 8192),
        # at T=4 the ten slow frames are four, whose patches are read once
        (OpWork(BFLOAT16, 1024, frames=4), (4 * 576 + 2880 + 64) * 2048),
        (OpWork(BFLOAT16, 1024, frames=4, peers="none", backward=True), (2880 + 64 + 4 * 576 + 4 * 576) * 2048),
        (OpWork(BFLOAT16, 1024, frames=(4, 50)), (54 * 576 + 2 * 2880 + 54 * 16) * 2048),
        (OpWork(BFLOAT16, 1024, layout=SlowFastLayout.parse("slowfast-slow_10frms_concat")), 2 * 5760 * 2048),
        # neither a mean nor a single patch has to be seen again for its gradient
        (
            OpWork(BFLOAT16, 1, layout=SlowFastLayout(10, "concat"), peers="none", backward=True),
            (5760 + 800 + 28800) * 2,
        ),
        (
            OpWork(BFLOAT16, 1, layout=SlowFastLayout(10, "spatial_2d_avg_pool"), peers="none", backward=True),
            (1440 + 800 + 28800) * 2,
        ),
    ],
    ids=str,
)
def test_the_bytes_that_must_move(work, expected):
    assert work.bytes_moved() == expected


def test_one_video_moves_the_bytes_of_many():
    ratio = works.ONE_VIDEO.bytes_moved() / works.VIDEOS.bytes_moved()
    assert ratio == pytest.approx(1, abs=0.001)
    assert len(works.VIDEOS.frames) == 32 and len(set(works.VIDEOS.frames)) > 20


def test_the_bars_of_a_gpu_are_those_asked_for():
    bars = {str(work): work.bars for work in works.CUDA_WORKS}
    for dtype in ("bfloat16", "float16"):
        peer = {"plain eager": (5, 8), "best peer": (1.25, 1.4)}
        assert bars[f"{dtype} D=4096"] == {"fairest copy": (0.92, 0.95), **peer}
        assert bars[f"{dtype} D=1024 behind CLS"] == {"fairest copy": (0.85, 0.9), **peer}
        assert bars[f"backward {dtype} D=4096"] == {"fairest copy": (0.88, 0.92)}
    assert bars["backward bfloat16 D=1024 behind CLS"] == {"fairest copy": (0.85, 0.9)}
    assert len(bars) == len(works.CUDA_WORKS)  # a name is a key of the JSON
    assert {work.frames for work in works.SWEEP} >= {8, 4096} and works.ONE_VIDEO_BAR == 0.9


def test_works_are_chosen_by_their_names_or_a_part_of_them():
    names = ["a", "ab", "b"]
    assert works.chosen(names, ()) == names
    assert works.chosen(names, ["a"]) == ["a"] and works.chosen(names, ["a", "b"]) == ["a", "b"]
    assert works.chosen(["ab", "cd", "ef"], ["a", "f"]) == ["ab", "ef"]
    with pytest.raises(ResultError, match="no work has 'c' in its name: there are a, ab, b"):
        works.chosen(names, ["c"])


def test_fewer_peers_have_no_best_one():
    work = works.MAIN[0]
    assert works.capped(work, "all") == work and works.capped(works.SWEEP[0], "eager") == works.SWEEP[0]
    eager = works.capped(work, "eager")
    assert eager.peers == "eager" and eager.bars.keys() == {"fairest copy", "plain eager"} and str(eager) == str(work)
    with pytest.raises(AssertionError):  # a peer writes tokens where a backward has their gradient
        OpWork(BFLOAT16, 8, backward=True, peers="plain")


def test_the_committed_result_names_the_works_of_the_cpu():
    result = read_result(ROOT / "bench/results/cpu-amd-epyc-genoa/op.json")
    assert list(result["works"]) == [str(work) for work in works.CPU_WORKS]
    for work in works.CPU_WORKS:
        figures = result["works"][str(work)]
        assert figures["bytes"] == work.bytes_moved()
        assert {name: (bar["bar"],) for name, bar in figures["bars"].items()} == work.bars


# --- peers


@pytest.mark.parametrize("frames", [8, 14, 50])  # at T=8 frames repeat; i * T // 10 would differ at T=14 with 8 frames
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_every_peer_computes_the_tokens(monkeypatch, frames, dtype):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    work = OpWork(dtype, 8, True, frames=frames)
    features, out = work.make_set("cpu", torch.Generator().manual_seed(1))
    found = peers.peers(work, "cpu", None)
    assert set(found) == {"plain eager", "best eager", "compiled plain", "compiled best"}
    for name, fill in found.items():
        op.check(name, lambda _, fill=fill: (fill(features, out), out)[1], work.expected(features, out), work)


@pytest.mark.parametrize("layout", ["concat", "spatial_1d_avg_pool", "spatial_2d_max_pool", "spatial_2d_avg_pool"])
def test_the_plain_form_of_other_layouts(layout):
    work = OpWork(torch.float32, 8, peers="plain", frames=14, layout=SlowFastLayout(8, layout, (5, 3)))
    features, out = work.make_set("cpu", torch.Generator().manual_seed(1))
    [(name, fill)] = peers.peers(work, "cpu", None).items()
    op.check(name, lambda _: (fill(features, out), out)[1], work.expected(features, out), work)


# --- a GPU that is none: FakeCuda


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr(timers.CudaTimer, "_WARM_UP", 0)
    monkeypatch.setattr(timers.CpuTimer, "_EVICT_BYTES", 8)
    monkeypatch.setattr(op, "_HOST_ROUNDS", 2)
    monkeypatch.setattr(op, "_HOST_CALLS", 2)
    monkeypatch.setattr(copies, "_LARGE", 1 << 16)


def test_torch_has_what_the_timer_calls():
    names = set(re.findall(r"_cuda\.(\w+)", inspect.getsource(timers)))
    assert len(names) > 10 and all(hasattr(torch.cuda, name) and hasattr(FakeCuda, name) for name in names)
    inspect.signature(torch.cuda.graph).bind(None, capture_error_mode="thread_local")


def test_buffers_go_round_beyond_the_cache():
    timer = timers.CudaTimer(FakeCuda(l2=60 << 20))
    for size in (1 << 20, 66_519_040, 266_076_160, 5 << 30):
        sets = timer.sets(size)
        assert sets >= 2 and (sets - 1) * size >= 3 * (60 << 20)
        assert sets == 2 or (sets - 2) * size < 3 * (60 << 20)  # and no more than that takes


def test_a_sample_is_a_graph_of_many_calls_round_the_sets():
    fake, called = FakeCuda(elapsed=lambda: 24.0), []
    timer = timers.CudaTimer(fake)
    sample = timer.prepare(called.append, 3)
    assert called == [0, 1, 2] + [0, 1, 2] * 3 and sample.graph and sample.calls == 9
    fake.log.clear()
    other = timers.Sample(lambda: fake.log.append("other"), 2, False)
    times = timer.times({"a": sample, "b": other}, 4)
    assert times == {"a": pytest.approx([24e-3 / 9] * 4), "b": pytest.approx([24e-3 / 2] * 4)}
    rounds = [entry for entry in fake.log if entry in ("replay", "other")]
    assert rounds == ["replay", "other", "other", "replay"] * 2  # each round begins with another
    assert fake.log[:4] == ["sleep", "event", "replay", "event"]
    assert called == [0, 1, 2] * 4  # timing called nothing but the graph


def test_what_cannot_be_captured_is_timed_without_a_graph():
    fake, called = FakeCuda(captures=False), []
    sample = timers.CudaTimer(fake).prepare(called.append, 2)
    assert sample.graph is False and sample.calls == 8
    assert "stream 7" in fake.log  # back from the stream of the capture
    del called[:]
    sample.run()
    assert called == [0, 1] * 4


def fake_setup(fake, *some_works, ours=("cpu", "torch"), **options):
    for name in ours:
        assert backends.BACKENDS[name].why_unavailable(None) is None
    setup = {"device": "cpu", "works": some_works, "ours": ours, "slow": (), "timer": timers.CudaTimer(fake)}
    return op.DeviceSetup(**setup | options)


def measure(setup, save=lambda result: None, slow_peers=False):
    return op.run(setup, 5, slow_peers, (), save)


TINY = OpWork(torch.float32, 8, True, {"fairest copy": (0.5, 0.9)}, peers="eager", frames=3)
COPIES = {"copy_": copies.torch_copy, copies.KERNEL: copies.torch_copy}


def test_the_whole_way_of_a_gpu(monkeypatch):
    monkeypatch.setattr(op, "machine", lambda device: {"gpu": "Fake 1", "cpu": "x", "torch": "1", "commit": "0"})
    many, one = (OpWork(torch.float32, 8, peers="none", frames=frames) for frames in ((2, 1), 3))
    sweep = (OpWork(torch.float32, 8, peers="none", frames=4), OpWork(torch.float32, 8, peers="none", frames=8))
    monkeypatch.setattr(works, "VIDEOS", many)
    monkeypatch.setattr(works, "ONE_VIDEO", one)
    monkeypatch.setattr(works, "SWEEP", sweep)
    fake = FakeCuda(l2=1 << 18)
    fake.requested = TINY.plan.offsets[-1] * 8 * 4
    backward = OpWork(torch.float32, 8, backward=True, peers="none", frames=3)
    plain = OpWork(torch.float32, 8, peers="plain", frames=3, layout=SlowFastLayout(2, "concat", (5, 5)))
    setup = fake_setup(fake, TINY, backward, plain, many, one, *sweep, copies=COPIES)
    saved = []
    result = measure(setup, lambda result: saved.append(list(result["works"])))
    assert not result["errors"] and not result["skipped"]
    assert len(saved) == len(setup.works) + 2 and saved[0] == [] and "host" in result  # which comes first
    tiny = result["works"][str(TINY)]
    assert set(tiny["providers"]) == {"plain eager", "best eager", "cpu", "torch", "copy_", "copy kernel"}
    assert {name for name, row in tiny["providers"].items() if not row["graph"]} == {"torch"}
    fairest = min(COPIES, key=lambda name: tiny["providers"][name]["p50_ms"])
    assert tiny["fairest_copy"] == fairest and tiny["bars"]["torch: fairest copy"]["bar"] == 0.5
    for name, row in tiny["providers"].items():
        assert ("tokens_per_s" in row) == (name not in COPIES)
    assert tiny["tokens"] == TINY.plan.offsets[-1]
    assert tiny["providers"]["cpu"]["tokens_per_s"] == pytest.approx(
        tiny["tokens"] / tiny["providers"]["cpu"]["p50_ms"] * 1e3
    )
    assert tiny["bars"]["fairest copy"].keys() == {"bar", "stretch", "ratio"} and result["large_copy_gb_per_s"] > 0
    assert tiny["bars"]["torch: memory"] == {"bar": 0.99, "ratio": 1.0}
    assert set(result["works"][str(backward)]["bars"]) == {"fairest copy", "torch: fairest copy"}
    assert "torch: one video" in result["works"][str(many)]["bars"]
    assert result["sweep"].keys() == {"time grows as bytes to the power of"}
    assert set(result["host"]["bars"]) == {"10 us", "torch: 10 us"}
    assert result["host"]["bars"]["10 us"]["bar"] is None  # of a GPU alone
    assert json.loads(json.dumps(result)) == result
    op_report.show(result, make_console())


def test_what_fails_costs_nothing_else(monkeypatch):
    def fails(features, out):
        raise RuntimeError("it does not compile\nand more")

    wrong = {"best eager": lambda features, out: out.zero_(), "plain eager": fails}
    monkeypatch.setattr(op, "peers", lambda *_: wrong)
    breaking = OpWork(torch.float32, 8, frames=2, layout=SlowFastLayout(2, fast_grid=(2, 2)))
    monkeypatch.setattr(OpWork, "make_set", boom_for(breaking))
    result = measure(fake_setup(FakeCuda(), breaking, TINY))
    assert set(result["works"]) == {str(TINY)}
    assert set(result["works"][str(TINY)]["providers"]) == {"cpu", "torch", "copy_"}
    assert result["errors"] == {
        str(breaking): "ValueError: boom",
        f"{TINY}: best eager": "AssertionError: computes other values than the reference",
        f"{TINY}: plain eager": "RuntimeError: it does not compile",
    }


def boom_for(breaking, make_set=OpWork.make_set):
    def make(self, *arguments):
        if self == breaking:
            raise ValueError("boom")
        return make_set(self, *arguments)

    return make


def test_a_backend_of_ours_that_is_one_bit_off_has_no_figures(monkeypatch):
    monkeypatch.setattr(op, "run_forward", nearly)
    result = measure(fake_setup(FakeCuda(), TINY))
    assert set(result["errors"]) == {f"{TINY}: cpu"} and "cpu" not in result["works"][str(TINY)]["providers"]


def test_who_writes_nothing_is_not_taken_for_right():
    """Not even where another one wrote the right values into the same tensor before."""
    written = torch.ones(3)
    with pytest.raises(AssertionError, match="other values"):
        op.check("cpu", lambda number: written, torch.ones(3), TINY)
    op.check("cpu", lambda number: written.fill_(1), torch.ones(3), TINY)


def nearly(work, sets, backend, number, aggregate=op.run_forward):
    out = aggregate(work, sets, backend, number)
    if backend == "cpu":
        out.view(torch.int32)[-1, -1] += 1
    return out


def test_a_work_that_does_not_fit_is_skipped_with_a_reason():
    result = measure(fake_setup(FakeCuda(free=1000), TINY))
    assert not result["works"] and "0.0 GB are free" in result["skipped"][str(TINY)]


def test_the_cpu_is_timed_as_before():
    work = OpWork(torch.float32, 8, True, {"best peer": (0.1,), "copy_": (0.1,)}, peers="eager")
    setup = fake_setup(None, work, ours=("cpu",), timer=timers.CpuTimer(), slow=("plain eager", "torch"))
    [figures] = measure(setup, slow_peers=True)["works"].values()
    assert list(figures["providers"]) == ["best eager", "cpu", "copy_", "plain eager"]
    assert set(figures["bars"]) == {"best peer", "copy_"} and figures["best_peer"] == "best eager"
    assert set(figures["providers"]["cpu"]) == {"p20_ms", "p50_ms", "p80_ms", "tokens_per_s", "ratio"}


def test_sanitizers_calls_are_right_and_would_say_if_not(monkeypatch):
    assert backends.BACKENDS["cpu"].why_unavailable(None) is None
    assert sanitize.run(("cpu", "torch"), "cpu") == []
    wrong = dataclasses.replace(backends.BACKENDS["torch"], run_backward=lambda grad, features, plan, out: out.zero_())
    monkeypatch.setitem(backends.BACKENDS, "torch", wrong)
    assert len(sanitize.run(("torch",), "cpu")) == len(sanitize.CASES) * 2 * 2


# --- results


def result_of(device="NVIDIA H200", ratio=0.9, spread=0.01):
    row = {"p20_ms": 1 - spread, "p50_ms": 1.0, "p80_ms": 1 + spread, "ratio": 1.0}
    bars = {"cuda: copy_": {"bar": 0.85, "ratio": ratio}}
    figures = {"bytes": 10**8, "best_peer": None, "providers": {"cuda": row, "copy_": row}, "bars": bars}
    return {"machine": {"gpu": device, "cpu": "x"}, "works": {"bfloat16 D=4096": figures}}


@pytest.mark.parametrize(
    "old, new, margin, regressed",
    [
        (result_of(), result_of(), 0.1, False),
        (result_of(), result_of(ratio=0.82), 0.1, False),
        (result_of(), result_of(ratio=0.80), 0.1, True),
        (result_of(), result_of(ratio=2.0), 0.1, False),
        (result_of(), result_of(ratio=0.82), 0.01, True),
        (result_of(), result_of(ratio=0.80, spread=0.1), 0.1, False),  # noise of 10 % twice
        (result_of(spread=0.1), result_of(ratio=0.80), 0.1, False),
        (result_of(spread=0.1), result_of(ratio=0.70), 0.1, True),
        (result_of(), result_of(ratio=float("nan")), 0.1, True),
    ],
)
def test_compare_sees_a_regression_beyond_noise(old, new, margin, regressed):
    [change] = compare(old, new, margin)
    assert change.regressed == regressed


def test_compare_shows_tokens_per_second_where_a_result_has_them(capsys):
    old, new = result_of(), result_of()
    new["works"]["bfloat16 D=4096"]["providers"]["cuda"] |= {"tokens_per_s": 3_680_000.0}
    [change] = changes = compare(old, new, 0.1)
    assert change.tokens_per_s == (None, 3_680_000.0)
    show_changes(changes, make_console())
    assert "3,680,000" in capsys.readouterr().out


def test_compare_misses_what_was_not_measured_again():
    old, new = result_of(), result_of()
    old["works"]["more"] = copy.deepcopy(old["works"]["bfloat16 D=4096"])
    assert [change.regressed for change in compare(old, new, 0.1)] == [False, True]
    with pytest.raises(ResultError, match="no figure in common"):
        compare({**old, "works": {"more": old["works"]["more"]}}, new, 0.1)
    with pytest.raises(ResultError, match="different devices: NVIDIA H200 and NVIDIA A100"):
        compare(old, result_of("NVIDIA A100"), 0.1)


def bench(*arguments, **environment):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return cli.main()


@pytest.mark.parametrize(
    "facts",
    [
        {"processor": "AuthenticAMD family 26 model 17 avx2 avx512f", "isa": "avx512"},
        {"processor": "AuthenticAMD family 25 model 17 avx2 avx512f", "isa": "avx2"},
        {},
    ],
)
def test_compare_refuses_another_processor_or_instruction_set(facts):
    old, new = result_of(), result_of()
    noted = {"processor": "AuthenticAMD family 25 model 17 avx2 avx512f", "isa": "avx512"}
    old["machine"], new["machine"] = {"cpu": "AMD EPYC"} | noted, {"cpu": "AMD EPYC"} | facts
    compare(old, old, 0.1)
    compare(new, new, 0.1)
    refused = r"different devices: AMD EPYC \(.*family 25.*, avx512\) and AMD EPYC \("
    with pytest.raises(ResultError, match=refused) as error:
        compare(old, new, 0.1)
    assert "\n" not in str(error.value)


def test_a_processor_is_named_by_family_model_and_flags(tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "flags\t\t: fpu avx avx2 avx512f avx512_bf16 avx512dq\n\nprocessor\t: 1\nmodel\t: 99\n"
    )
    assert processor(str(tmp_path / "cpuinfo")) == "AuthenticAMD family 26 model 17 avx2 avx512f avx512_bf16"
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert processor(str(tmp_path / "arm")) == platform.machine() == processor(str(tmp_path / "none"))


def test_compare_by_its_exit_status(monkeypatch, tmp_path, capsys):
    worse = json.loads(COMMITTED.read_text())
    worse["works"]["float32 D=4096"]["bars"]["copy_"]["ratio"] /= 2
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    (tmp_path / "gpu.json").write_text(json.dumps(result_of()))
    (tmp_path / "other.json").write_text("[1]")
    assert main(monkeypatch, "compare", COMMITTED, COMMITTED) == 0
    assert main(monkeypatch, "compare", COMMITTED, tmp_path / "worse.json") == 1
    assert capsys.readouterr().out.count("REGRESSED") == 1
    assert main(monkeypatch, "compare", tmp_path / "worse.json", COMMITTED) == 0
    for file in ("gpu.json", "other.json", "none.json"):
        assert main(monkeypatch, "compare", COMMITTED, tmp_path / file) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_plot_draws_a_cpu_and_a_gpu(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "gpu.json").write_text(json.dumps(result_of()))
    picture = tmp_path / "new" / "roofline.png"
    assert main(monkeypatch, "plot", COMMITTED, tmp_path / "gpu.json", "--out", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert plot.points(result_of()) == {"cuda": [(10**8, pytest.approx(100))], "copy_": [(10**8, pytest.approx(100))]}


def test_a_devices_folder():
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("NVIDIA GeForce RTX 4090 (x)") == "nvidia-geforce-rtx-4090-x"


# --- the one command for a GPU


@pytest.mark.parametrize("command", [["gpu"], ["op", "--device", "cuda"]], ids=" ".join)
def test_without_a_gpu_it_says_so_in_a_line(command):
    ended = bench(*command, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "no CUDA device was found" in ended.stderr


def step(name, code, limit=20, expected=1, **options):
    return gpu.Step(name, [sys.executable, "-c", code], expected, limit, **options)


def test_a_step_that_fails_stops_no_other(tmp_path, capfd):
    mark = f"open({str(tmp_path / 'ran')!r}, 'w')"
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start, file = time.monotonic(), tmp_path / "steps.json"
    reads = f"import json; assert len(json.load(open({str(file)!r}))['steps']) == 5"
    status = gpu.run_steps(
        [
            step("fails", "raise SystemExit(4)"),
            step("hangs", hangs, 0.5),
            step("lies", "", why_failed=lambda: "proved nothing"),
            step("lacks a tool", "", why_not=lambda: "missing: nvcc"),
            step("is refused", "", why_not=lambda: "not here", optional=True),
            step("finds them written", reads + "; print(*range(100), sep='\\n')"),
            step("does not fit", mark + "; 1 / 0", expected=100),
            step("works", mark),
        ],
        file,
        60,
        {"facts": {"gpu": "x"}},
    )
    assert status == 1 and (tmp_path / "ran").exists() and time.monotonic() - start < 30
    written = json.loads(file.read_text())
    assert written["facts"] == {"gpu": "x"}
    outcomes = [(outcome["status"], outcome["reason"]) for outcome in written["steps"]]
    (dropped, left) = outcomes.pop(6)
    assert dropped == "DROPPED" and re.fullmatch(r"[345]\d s were left", left)
    assert outcomes == [
        ("FAILED", "exit status 4"),
        ("FAILED", "took longer than 0 s"),
        ("FAILED", "proved nothing"),
        ("FAILED", "missing: nvcc"),
        ("skipped", "not here"),
        ("passed", ""),
        ("passed", ""),
    ]
    out = capfd.readouterr().out
    assert "--- works" in out and "proved nothing" in out and "expected" in out
    assert "\n99\n" in out and "\n80\n" not in out and "\n80\n" in (tmp_path / "steps.log").read_text()
    assert gpu.run_steps([step("is refused", "", why_not=lambda: "not here", optional=True)], file, 60) == 0


def test_no_time_left_is_a_failure(tmp_path):
    assert gpu.run_steps([step("works", "")], tmp_path / "steps.json", 0.5) == 1


def parsed(step):
    """The arguments of a step that is a command of ours, under whatever tool it runs."""
    place = next((i for i in range(len(step.command)) if step.command[i : i + 3] == gpu.BENCH), None)
    return None if place is None else cli.make_parser().parse_args(step.command[place + 3 :])


def check_steps(found, folder, most_seconds):
    """Every command is understood, every file written in the folder, and all fits."""
    for step in found:
        assert step.expected < step.limit and all((ROOT / w).exists() for w in step.command if w.startswith("tests/"))
        args = parsed(step)
        assert getattr(args, "json", None) is None or args.json.parent == folder
        assert getattr(args, "device", "cuda") == "cuda"
    written = {args.json.name for step in found if getattr(args := parsed(step), "json", None)}
    assert len(written) <= 5  # with the steps, their log and ncu's counters: eight files come back
    assert sum(step.expected for step in found) <= most_seconds
    return {step.name: step for step in found}


def test_the_steps(tmp_path):
    found = check_steps(gpu.op_steps(tmp_path, "90", 4), tmp_path, 400)
    measured = ["small calls", "op", "tune", "counters", "op, torch.compile"]
    assert list(found) == [*measured, "tests on the device", "memcheck", "build"]
    assert [name for name, step in found.items() if step.optional] == ["counters", "memcheck"]
    assert "CUDAARCHS=90-real" in found["build"].command
    assert parsed(found["op"]).peers == "eager"
    compiled = works.chosen(works.CUDA_WORKS, parsed(found["op, torch.compile"]).only)
    assert compiled == list(works.MAIN[:2]) and {work.peers for work in compiled} == {"all"}
    assert parsed(found["counters"]).main_works and not parsed(found["memcheck"]).main_works


def test_the_steps_of_the_pipeline(tmp_path):
    found = check_steps(gpu.pipeline_steps(tmp_path, "90", 4), tmp_path, 280)
    assert list(found) == ["7B shapes", "projector", "tests on the device", "embedded model", "reduction", "layouts"]
    assert parsed(found["7B shapes"]).config == "7b" and parsed(found["embedded model"]).dtype == "float32"


def test_libraries_that_were_not_carried_are_built_first(tmp_path, monkeypatch):
    pretend_a_device(monkeypatch.setattr)
    monkeypatch.setattr(carried, "why_not", lambda arch: "nothing was built beforehand")
    monkeypatch.setattr(gpu, "run_steps", lambda steps, file, seconds, known: (steps, file, seconds, known))
    steps, file, seconds, told = gpu.run(tmp_path, "op", 300)
    assert steps[0].name == "build first" and parsed(steps[0]).install and parsed(steps[0]).arch == "90"
    assert file == tmp_path / "rehearsal/op-steps.json" and 290 < seconds < 300
    assert told["not_carried"] == "nothing was built beforehand" and "nvcc" in told["facts"]["tools"]
    monkeypatch.setattr(carried, "why_not", lambda arch: None)
    assert gpu.run(tmp_path, "op", 300)[0][0].name == "small calls"


BACKENDS = ("cuda", "triton")
REPORT = "<testsuites><testsuite>{}</testsuite></testsuites>"
RAN = '<testcase classname="tests.test_gpu" name="test_views[{}-one]"/>'
SKIPPED = '<testcase classname="tests.test_gpu" name="test_views[{}-one]"><skipped/></testcase>'


@pytest.mark.parametrize(
    "cases, reason",
    [
        ([RAN.format("cuda"), RAN.format("triton"), SKIPPED.format("cuda")], None),
        ([RAN.format("triton"), SKIPPED.format("cuda")], "every test of cuda was skipped"),
        ([SKIPPED.format("cuda"), SKIPPED.format("triton")], "every test of cuda and triton was skipped"),
        ([], "every test of cuda and triton was skipped"),
    ],
)
def test_skipped_tests_prove_nothing(tmp_path, cases, reason):
    report = tmp_path / "tests.xml"
    report.write_text(REPORT.format("".join(cases)))
    assert gpu.why_no_proof(report, BACKENDS) == reason
    assert gpu.why_no_proof(report, BACKENDS) == "the tests did not run to their end"  # the report is gone with its run


def test_a_sanitizer_that_refuses_is_told_from_one_that_finds(tmp_path):
    refuses = tmp_path / "refuses"
    said = "========= COMPUTE-SANITIZER\n========= Error: Device not supported"
    refuses.write_text(f"#!/bin/sh\necho '{said}'\nexit 1\n")
    works_ = tmp_path / "works"
    works_.write_text("#!/bin/sh\nexit 0\n")
    for script in (refuses, works_):
        script.chmod(0o755)
    assert gpu.why_refused(str(refuses)) == "this machine refuses it: Error: Device not supported"
    assert gpu.why_refused(str(works_)) is None
    assert "not found" in gpu.why_refused(str(tmp_path / "none"))


def test_the_reports_names_are_those_of_pytest(tmp_path):
    """What `why_no_proof` looks for is in the names that pytest gives the GPU tests."""
    report = tmp_path / "tests.xml"
    command = [*gpu.pytest_command(0), "tests/ops/test_gpu.py", "-k", "test_no_channels", f"--junitxml={report}"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert ended.returncode in (0, 5)
    assert "test_no_channels[cuda]" in report.read_text()
    assert gpu.why_no_proof(report, BACKENDS) == "every test of cuda and triton was skipped"


# --- its commands on the stand-in


@pytest.fixture
def rehearsed(monkeypatch):
    rehearse(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_every_work_of_a_gpu_goes_through(rehearsed, tmp_path, monkeypatch, capsys):
    written = tmp_path / "op.json"
    assert main(monkeypatch, "op", "--device", "cuda", "--rounds", "2", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in works.CUDA_WORKS]
    assert not result["errors"] and not result["skipped"]
    for work in works.CUDA_WORKS:
        rows, bars = result["works"][str(work)]["providers"], result["works"][str(work)]["bars"]
        assert {"cuda", "copy_", "copy kernel"} <= rows.keys() and ("compiled best" in rows) == (work.peers == "all")
        asked = {name.removeprefix("cuda: ") for name, bar in bars.items() if bar["bar"] and name.startswith("cuda: ")}
        assert set(work.bars) <= asked
    out = capsys.readouterr().out
    assert "against cuda: fairest copy, cop" in out and "% of a large copy" in out.replace("\n", " ")


def test_the_other_commands_of_the_ops_part(rehearsed, monkeypatch, capsys):
    assert main(monkeypatch, "small-calls") == 0 and main(monkeypatch, "small-calls", "--main-works") == 0
    assert "every value is right" in capsys.readouterr().out


# --- tunings


def test_a_sweep_ends_in_the_best_of_each_direction(rehearsed, tmp_path, monkeypatch, capsys):
    right = tune.Variant.run
    slow, spoiled = {"warps": 8}, {"store": "kStoreStreaming"}

    def run(variant, work, features, tokens, gradient):
        right(variant, work, features, tokens, gradient)
        if variant.tuning in [tune.changed(base, spoiled) for base in tune.defaults().values()]:
            (tokens if gradient is None else gradient).view(torch.int16)[0, 0] += 1

    monkeypatch.setattr(tune.Variant, "run", run)
    written = tmp_path / "tune.json"
    assert main(monkeypatch, "tune", "--rounds", "2", "--json", written) == 1  # for the wrong bits
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in works.MAIN] and not result["errors"]
    for work in works.MAIN:
        figures, base = result["works"][str(work)], tune.defaults()[tune.direction_of(work)]
        wrong = f"cuda {tune.changed(base, spoiled)}"
        assert set(figures["wrong"]) == {wrong} and wrong not in figures["providers"]
        timed = {f"cuda {base}", f"cuda {tune.changed(base, slow)}", "copy_", "copy kernel"}
        assert timed <= figures["providers"].keys()
        assert figures["best"]["cuda"] in figures["providers"]
    assert all(found["cuda"].startswith("cuda {") for found in result["best"].values())
    out = capsys.readouterr().out
    assert out.count("left out: cuda {") == len(works.MAIN) and "best backward over its works: cuda {" in out


def test_the_best_is_the_fastest_over_all_works_of_its_direction():
    def row(cuda, other):
        return {"providers": {"copy_": {"p50_ms": 0.1}, "cuda {1}": {"p50_ms": cuda}, "cuda {2}": {"p50_ms": other}}}

    one, two = (str(work) for work in works.MAIN[:2])
    assert tune.best_over({one: row(4, 5), two: row(4, 2)}, "forward") == {"cuda": "cuda {2}"}
    assert tune.best_over({one: row(4, 5)}, "forward") == {"cuda": "cuda {1}"}
    assert tune.best_over({one: row(4, 5)}, "backward") == {}


def test_the_variants_are_the_default_and_what_differs_in_a_few_ways():
    found = tune.variants()
    assert 20 <= len(found) <= 30 and len({variant.library for variant in found}) == len(found)
    for direction, base in tune.defaults().items():
        tunings = [variant.tuning for variant in found if variant.direction == direction]
        assert tunings[0] == base and tune.Tuning.parse(str(base)) == base
        fewer = [tuning for tuning in tunings if tuning.warps != base.warps]
        # as many registers for each lane
        assert fewer and all(t.blocks == base.blocks * base.warps // t.warps for t in fewer)
    assert not any(variant.tuning.by_strip for variant in found if variant.direction == "forward")


@pytest.fixture
def sources(tmp_path):
    copied = []
    for file in (tune.CUDA_FILE, tune.TRITON_FILE):
        copied.append(tmp_path / file.name)
        copied[-1].write_text(file.read_text())
    return copied


def test_the_best_tunings_become_the_default(sources, tmp_path):
    cuda, triton = sources
    best = {
        "forward": {"cuda": "cuda {8, 2, kLoad, kStore, true, false}", "triton": "triton Tuning(warps=2, vectors=1)"},
        "backward": {"cuda": "cuda {2, 8, kLoadNoAllocate, kStore, false, true}"},
    }
    file = tmp_path / "tune.json"
    file.write_text(json.dumps({"best": best}))
    before = cuda.read_text()
    assert len(tune.pick(file, *sources)) == 3
    texts = [source.read_text() for source in sources]
    assert "kForwardTuning{8, 2, kLoad, kStore, true, false};" in texts[0]
    assert "kBackwardTuning{2, 8, kLoadNoAllocate, kStore, false, true};" in texts[0]
    assert '"forward": Tuning(warps=2, vectors=1)' in texts[1]
    assert len(texts[0].splitlines()) == len(before.splitlines())
    tune.pick(file, *sources)
    assert [source.read_text() for source in sources] == texts


@pytest.mark.parametrize("text", ["[]", "{}", '{"best": {"forward": {}, "backward": {}}}', '{"best": 1}', "nothing"])
def test_without_a_result_nothing_is_picked(sources, tmp_path, text):
    before = [source.read_text() for source in sources]
    (tmp_path / "tune.json").write_text(text)
    for file in (tmp_path / "tune.json", tmp_path / "none.json"):
        with pytest.raises(ResultError):
            tune.pick(file, *sources)
    assert [source.read_text() for source in sources] == before


# --- what is carried


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree without .git, with a build."""
    for module in (record, carried):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "BUILT", tmp_path / "build/gpu")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.h").write_text("one")
    monkeypatch.setattr(carried, "_PACKAGE", tmp_path / "sfllava_fast")
    (tmp_path / "sfllava_fast").mkdir()
    told = {"commit": "abc-dirty", "arch": "90", "sources": record.sources_digest()}
    record.write_json(tmp_path / "build/gpu/build.json", told)
    return tmp_path


def test_a_tree_without_git_has_the_commit_of_its_build(tree):
    assert record.commit() == "abc-dirty"
    (tree / "csrc/a.h").write_text("two")
    assert record.commit() == "abc-dirty, changed since"
    (tree / "build/gpu/build.json").unlink()
    assert record.commit().startswith("release ")


def test_what_is_carried_serves_its_architecture_and_sources(tree):
    assert carried.why_not("90") is None
    assert carried.why_not("100") == "build/gpu is for sm_90, not sm_100"
    (tree / "csrc/a.h").write_text("two")
    assert carried.why_not("90") == "build/gpu was built from other sources"
    (tree / "build/gpu/build.json").unlink()
    assert "make gpu-build" in carried.why_not("90")


def test_the_carried_libraries_are_the_ones_that_are_used(tree):
    for name in ("_C.so", "_C_cuda.so"):
        (tree / "build/gpu" / name).write_text("carried")
    (tree / "sfllava_fast/_C.so").write_text("an older one")
    assert carried.install() == ["_C.so", "_C_cuda.so"] and carried.install() == []
    assert [(tree / "sfllava_fast" / name).read_text() for name in ("_C.so", "_C_cuda.so")] == ["carried"] * 2


def test_the_newest_glibc_that_a_library_needs(tmp_path):
    library = tmp_path / "a.so"
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.17\0GLIBCXX_3.4.29\0")
    assert carried.newest_glibc(library) == 34
    library.write_bytes(b"")
    assert carried.newest_glibc(library) == 0


def test_without_nvcc_nothing_is_built(tree, monkeypatch):
    monkeypatch.setenv("PATH", str(tree))
    monkeypatch.setenv("CUDA_HOME", str(tree))
    with pytest.raises(ResultError, match="no nvcc was found"):
        carried.build("90")
    assert carried.why_not("90") is None  # what was there still is


# --- projector


@pytest.fixture
def small_projector(monkeypatch):
    for name, value in {"FRAMES": 6, "GRID": (8, 8), "VISION": 32, "LANGUAGE": 64, "_CHECKED_FRAMES": 3}.items():
        monkeypatch.setattr(projector, name, value)


def test_the_projector_is_measured_after_its_errors(small_projector, tmp_path, monkeypatch, capsys):
    written = tmp_path / "projector.json"
    assert main(monkeypatch, "projector", "--rounds", "2", "--only", "float", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in projector.WORKS] and not result["errors"]
    for figures in result["works"].values():
        assert set(figures["providers"]) == {"exact", "commuted"}
        assert 0 < max(figures["error_over_exact"].values()) <= 1.01
    bars = [figures["bars"]["commuted: exact"]["bar"] for figures in result["works"].values()]
    assert bars == [1.95, 2.0, None, None]
    assert "error / exact's" in capsys.readouterr().out


def test_a_projector_that_errs_more_is_not_timed(small_projector, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(projector, "_MOST_ERROR", 0.1)
    assert main(monkeypatch, "projector", "--rounds", "2", "--only", "float32") == 1
    assert "the commuted order's error is" in capsys.readouterr().out


def test_the_projector_on_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(monkeypatch, "projector", "--device", "cuda") == 2
    assert capsys.readouterr().err == "bench: no CUDA device was found\n"


# --- drop-ins


@pytest.fixture
def small_dropins(monkeypatch):
    for name, value in {"FRAMES": 5, "GRID": (8, 8), "CHANNELS": 16}.items():
        monkeypatch.setattr(dropins, name, value)


def test_drop_ins_are_measured_after_their_tokens(small_dropins, tmp_path, monkeypatch, capsys):
    written = tmp_path / "dropins.json"
    assert main(monkeypatch, "dropins", "--rounds", "2", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in dropins.WORKS] and not result["errors"]
    for name, figures in result["works"].items():
        assert set(figures["providers"]) == {"patched", "published"}
        assert figures["same_bits"] or "spatial_temporal_pool bfloat16" in name
        for row in figures["providers"].values():
            assert row["tokens_per_s"] == pytest.approx(figures["tokens"] / row["p50_ms"] * 1e3)
    out = capsys.readouterr().out
    assert "published / patched" in out and "patched tokens/s" in out


def test_drop_ins_of_other_tokens_are_not_timed(small_dropins, monkeypatch, capsys):
    def patch(self, model):
        right = model.prepare_slowfast
        model.prepare_slowfast = lambda *call: right(*call) + 1

    monkeypatch.setattr(dropins.DropinCall, "patch", patch)
    assert main(monkeypatch, "dropins", "--rounds", "2", "--only", "prepare_slowfast") == 1
    assert "error: prepare_slowfast" in capsys.readouterr().out


@pytest.fixture
def small_layouts(monkeypatch):
    monkeypatch.setattr(layouts, "CHANNELS", {"after": 8, "before": 4})


def test_layouts_are_measured_after_their_tokens(small_layouts, tmp_path, monkeypatch, capsys):
    written = tmp_path / "layouts.json"
    assert main(monkeypatch, "layouts", "--rounds", "2", "--only", "float32", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in layouts.WORKS if "float32" in str(work)]
    assert not result["errors"] and all(f["providers"]["published"]["ratio"] > 0 for f in result["works"].values())
    for row in result["works"]["pllava float32"]["providers"].values():
        assert row["tokens_per_s"] == pytest.approx(2304 / row["p50_ms"] * 1e3)
    out = capsys.readouterr().out
    assert "pllava float32" in out and "op tokens/s" in out


def test_layouts_on_a_gpu_go_round_the_cache_in_a_graph(small_layouts):
    fake, work = FakeCuda(l2=1 << 20), layouts.WORKS[0]
    figures = layouts.measure(work, "cpu", timers.CudaTimer(fake), 3)
    assert timers.CudaTimer(fake).sets(figures["bytes"]) > 2
    assert fake.log.count("replay") == 2 + 2 * 3  # each form once when it was captured, then in every round


def test_layouts_of_other_tokens_are_not_timed(small_layouts, monkeypatch, capsys):
    monkeypatch.setitem(layouts.LAYOUTS, "pllava", layouts.LAYOUTS["uniform"])
    assert main(monkeypatch, "layouts", "--rounds", "2", "--only", "pllava float32") == 1
    assert "error: pllava float32" in capsys.readouterr().out


# --- streams


def test_a_stream_is_watched_in_every_mode_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "_MINUTE", 6)
    written, picture = tmp_path / "stream.json", tmp_path / "stream.png"
    assert main(monkeypatch, "stream", "--minutes", "4", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == list(stream.STREAM_MODES) and not result["errors"]
    for figures in result["works"].values():
        assert all(len(values) == 4 and min(values) > 0 for values in figures["minutes"].values())
        assert set(figures["bars"]) == set(stream.BARS)
    assert "second quarter / last" in capsys.readouterr().out
    assert main(monkeypatch, "plot", written, "--out", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_stream_without_quarters_is_refused(monkeypatch, capsys):
    assert main(monkeypatch, "stream", "--minutes", "3") == 2
    assert capsys.readouterr().err == "bench: 3 minutes have no quarters: give --minutes 4 or more\n"


def test_what_grows_is_not_flat():
    assert stream.flatness(np.full(8, 2.0)) == 1.0
    assert stream.flatness(np.arange(1.0, 9.0)) == 3.5 / 7.5
