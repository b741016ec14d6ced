"""The benchmark's own arithmetic and steps, without a GPU and without timing anything that counts."""

from __future__ import annotations

import contextlib
import copy
import inspect
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sfllava_fast import SlowFastConfig, backends

pytest.importorskip("rich")
from bench import __main__ as cli  # noqa: E402
from bench import dropins, gpu, layouts, op, peers, plot, projector, sanitize, stream, timers, works  # noqa: E402
from bench.compare import compare  # noqa: E402
from bench.record import ROOT, ResultError, folder_name, read_result  # noqa: E402
from bench.works import Work  # noqa: E402

COMMITTED = ROOT / "bench/results/cpu-amd-epyc-milan/op.json"
BFLOAT16 = torch.bfloat16


# --- works


@pytest.mark.parametrize(
    "work, expected",
    [
        (Work(BFLOAT16, 4096), 266_076_160),
        (Work(BFLOAT16, 1024, True), 66_519_040),
        (Work(torch.float32, 4096), 532_152_320),
        # 3680 tokens' gradients, 10 frames that a max chose from, 50 frames of gradient
        (Work(BFLOAT16, 4096, backward=True), (3680 + 10 * 576 + 50 * 576) * 8192),
        # at T=4 the ten slow frames are four, whose patches are read once
        (Work(BFLOAT16, 1024, frames=4), (4 * 576 + 2880 + 64) * 2048),
        (Work(BFLOAT16, 1024, frames=4, backward=True), (2880 + 64 + 4 * 576 + 4 * 576) * 2048),
        (Work(BFLOAT16, 1024, frames=(4, 50)), (54 * 576 + 2 * 2880 + 54 * 16) * 2048),
        (Work(BFLOAT16, 1024, layout=SlowFastConfig.parse("slowfast-slow_10frms_concat")), 2 * 5760 * 2048),
        # neither a mean nor a single patch has to be seen again for its gradient
        (Work(BFLOAT16, 1, layout=SlowFastConfig(10, "concat"), backward=True), (5760 + 800 + 28800) * 2),
        (Work(BFLOAT16, 1, layout=SlowFastConfig(10, "spatial_2d_avg_pool"), backward=True), (1440 + 800 + 28800) * 2),
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
        peer = {"plain eager": (5, 8), "best peer": (1.3, 2)}
        assert bars[f"{dtype} D=4096"] == {"copy_": (0.85, 0.92), **peer}
        assert bars[f"{dtype} D=1024 behind CLS"] == {"copy_": (0.65, 0.8), **peer}
        assert bars[f"backward {dtype} D=4096"] == {"copy_": (0.75, 0.85)}
    assert len(bars) == len(works.CUDA_WORKS)  # a name is a key of the JSON
    assert {work.frames for work in works.SWEEP} >= {8, 4096} and works.ONE_VIDEO_BAR == 0.9


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
    work = Work(dtype, 8, True, frames=frames)
    features, out = work.make_set("cpu", torch.Generator().manual_seed(1))
    found = peers.peers(work, "cpu", None)
    assert set(found) == {"plain eager", "best eager", "compiled plain", "compiled best"}
    for name, fill in found.items():
        op._check(name, lambda _, fill=fill: (fill(features, out), out)[1], out, work.expected(features, out), work)


@pytest.mark.parametrize("layout", ["concat", "spatial_1d_avg_pool", "spatial_2d_max_pool", "spatial_2d_avg_pool"])
def test_the_plain_form_of_other_layouts(layout):
    work = Work(torch.float32, 8, peers="plain", frames=14, layout=SlowFastConfig(8, layout, (5, 3)))
    features, out = work.make_set("cpu", torch.Generator().manual_seed(1))
    [(name, fill)] = peers.peers(work, "cpu", None).items()
    op._check(name, lambda _: (fill(features, out), out)[1], out, work.expected(features, out), work)


# --- a GPU that is none


class FakeGraph:
    """Replays what ran while it was captured; what copies from the host cannot be captured."""

    def replay(self):
        self.calls()


class FakeCuda:
    """torch.cuda as CudaTimer uses it, on the CPU. `elapsed` gives every pair of events its milliseconds."""

    CUDAGraph = FakeGraph

    def __init__(self, elapsed=None, l2=1 << 20, free=1 << 40, captures=True):
        self.elapsed, self.l2, self.free, self.captures, self.requested = elapsed, l2, free, captures, 0
        self.log = []

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: (self.log.append("event"), setattr(event, "at", time.perf_counter()))
        event.elapsed_time = lambda end: self.elapsed() if self.elapsed else (end.at - event.at) * 1e3
        return event

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        graph.calls = lambda: self.log.append("replay")
        yield
        if not self.captures:
            raise RuntimeError("operation failed due to a previous error during capture")

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=self.l2)

    def memory_stats(self):
        return {"requested_bytes.all.current": 100, "requested_bytes.all.peak": 100 + self.requested}

    def _sleep(self, cycles):
        self.log.append("sleep")

    def mem_get_info(self):
        return self.free, 1 << 40

    def set_stream(self, stream):
        self.log.append(f"stream {stream}")

    def current_stream(self):
        return 7

    def current_device(self):
        return 0

    def synchronize(self):
        pass

    empty_cache = reset_peak_memory_stats = synchronize


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr(timers.CudaTimer, "_WARM_UP", 0)
    monkeypatch.setattr(timers.CpuTimer, "_EVICT_BYTES", 8)
    monkeypatch.setattr(op, "_HOST_ROUNDS", 2)
    monkeypatch.setattr(op, "_HOST_CALLS", 2)


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


def fake_lab(fake, *some_works, ours=("cpu", "torch"), **options):
    for name in ours:
        assert backends.BACKENDS[name].why_unavailable(None) is None
    lab = {"device": "cpu", "works": some_works, "ours": ours, "slow": (), "timer": timers.CudaTimer(fake)}
    return op.Lab(**lab | options)


def measure(lab, save=lambda result: None, slow_peers=False):
    return op.run(lab, 5, slow_peers, "", save)


TINY = Work(torch.float32, 8, True, {"copy_": (0.5, 0.9)}, peers="eager", frames=3)


def test_the_whole_way_of_a_gpu(monkeypatch):
    monkeypatch.setattr(op, "machine", lambda device: {"gpu": "Fake 1", "cpu": "x", "torch": "1", "commit": "0"})
    many, one = (Work(torch.float32, 8, peers="none", frames=frames) for frames in ((2, 1), 3))
    sweep = (Work(torch.float32, 8, peers="none", frames=4), Work(torch.float32, 8, peers="none", frames=8))
    monkeypatch.setattr(works, "VIDEOS", many)
    monkeypatch.setattr(works, "ONE_VIDEO", one)
    monkeypatch.setattr(works, "SWEEP", sweep)
    fake = FakeCuda(l2=1 << 18)
    fake.requested = TINY.plan.offsets[-1] * 8 * 4
    backward = Work(torch.float32, 8, backward=True, peers="none", frames=3)
    plain = Work(torch.float32, 8, peers="plain", frames=3, layout=SlowFastConfig(2, "concat", (5, 5)))
    lab = fake_lab(fake, TINY, backward, plain, many, one, *sweep)
    saved = []
    result = measure(lab, saved.append)
    assert not result["errors"] and not result["skipped"]
    assert len(saved) == len(lab.works) + 1
    tiny = result["works"][str(TINY)]
    assert set(tiny["providers"]) == {"plain eager", "best eager", "cpu", "torch", "copy_"}
    assert {name for name, row in tiny["providers"].items() if not row["graph"]} == {"torch"}
    assert tiny["bars"]["copy_"].keys() == {"bar", "stretch", "ratio"} and tiny["bars"]["torch: copy_"]["bar"] == 0.5
    assert tiny["bars"]["torch: memory"] == {"bar": 0.99, "ratio": 1.0}
    assert set(result["works"][str(backward)]["bars"]) == {"copy_", "torch: copy_"}
    assert "torch: one video" in result["works"][str(many)]["bars"]
    assert result["sweep"].keys() == {"time grows as bytes to the power of"}
    assert set(result["host"]["bars"]) == {"10 us", "torch: 10 us"}
    assert result["host"]["bars"]["10 us"]["bar"] is None  # of a GPU alone
    assert json.loads(json.dumps(result)) == result
    cli._print(result)


def test_what_fails_costs_nothing_else(monkeypatch):
    def fails(features, out):
        raise RuntimeError("it does not compile\nand more")

    wrong = {"best eager": lambda features, out: out.zero_(), "plain eager": fails}
    monkeypatch.setattr(op, "peers", lambda *_: wrong)
    breaking = Work(torch.float32, 8, frames=2, layout=SlowFastConfig(2, fast_grid=(2, 2)))
    monkeypatch.setattr(Work, "make_set", boom_for(breaking))
    result = measure(fake_lab(FakeCuda(), breaking, TINY))
    assert set(result["works"]) == {str(TINY)}
    assert set(result["works"][str(TINY)]["providers"]) == {"cpu", "torch", "copy_"}
    assert result["errors"] == {
        str(breaking): "ValueError: boom",
        f"{TINY}: best eager": "AssertionError: computes other values than the reference",
        f"{TINY}: plain eager": "RuntimeError: it does not compile",
    }


def boom_for(breaking, make_set=Work.make_set):
    def make(self, *arguments):
        if self == breaking:
            raise ValueError("boom")
        return make_set(self, *arguments)

    return make


def test_a_backend_of_ours_that_is_one_bit_off_has_no_figures(monkeypatch):
    monkeypatch.setattr(op, "_aggregate", nearly)
    result = measure(fake_lab(FakeCuda(), TINY))
    assert set(result["errors"]) == {f"{TINY}: cpu"} and "cpu" not in result["works"][str(TINY)]["providers"]


def nearly(work, sets, backend, number, aggregate=op._aggregate):
    out = aggregate(work, sets, backend, number)
    if backend == "cpu":
        out.view(torch.int32)[-1, -1] += 1
    return out


def test_a_work_that_does_not_fit_is_skipped_with_a_reason():
    result = measure(fake_lab(FakeCuda(free=1000), TINY))
    assert not result["works"] and "0.0 GB are free" in result["skipped"][str(TINY)]


def test_the_cpu_is_timed_as_before():
    work = Work(torch.float32, 8, True, {"best peer": (0.1,), "copy_": (0.1,)}, peers="eager")
    lab = fake_lab(None, work, ours=("cpu",), timer=timers.CpuTimer(), slow=("plain eager", "torch"))
    [figures] = measure(lab, slow_peers=True)["works"].values()
    assert list(figures["providers"]) == ["best eager", "cpu", "copy_", "plain eager"]
    assert set(figures["bars"]) == {"best peer", "copy_"} and figures["best_peer"] == "best eager"
    assert set(figures["providers"]["cpu"]) == {"p20_ms", "p50_ms", "p80_ms", "ratio"}


def test_sanitizers_calls_are_right_and_would_say_if_not(monkeypatch):
    assert backends.BACKENDS["cpu"].why_unavailable(None) is None
    assert sanitize.run(("cpu", "torch"), "cpu") == []
    wrong = dataclasses.replace(backends.BACKENDS["torch"], run_backward=lambda grad, features, plan, out: out.zero_())
    monkeypatch.setitem(backends.BACKENDS, "torch", wrong)
    assert len(sanitize.run(("torch",), "cpu")) == 3 * 2 * 2


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


def test_compare_misses_what_was_not_measured_again():
    old, new = result_of(), result_of()
    old["works"]["more"] = copy.deepcopy(old["works"]["bfloat16 D=4096"])
    assert [change.regressed for change in compare(old, new, 0.1)] == [False, True]
    with pytest.raises(ResultError, match="no figure in common"):
        compare({**old, "works": {"more": old["works"]["more"]}}, new, 0.1)
    with pytest.raises(ResultError, match="different devices: NVIDIA H200 and NVIDIA A100"):
        compare(old, result_of("NVIDIA A100"), 0.1)


@pytest.mark.parametrize("fact", ["isa", "cpu_family", "cpu_model"])
def test_compare_refuses_another_kind_of_the_same_processor(fact):
    old, new = result_of(), result_of()
    old["machine"][fact], new["machine"][fact] = "25", "26"
    with pytest.raises(ResultError, match=f"different processors: {fact} 25 and 26"):
        compare(old, new, 0.1)
    del new["machine"][fact]  # written before it was recorded
    assert compare(old, new, 0.1)


def bench(*arguments, **environment):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return cli.main()


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


def step(name, code, limit=20, **options):
    return gpu.Step(name, [sys.executable, "-c", code], limit, **options)


def test_a_step_that_fails_stops_no_other(tmp_path, capfd):
    mark = f"open({str(tmp_path / 'ran')!r}, 'w')"
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    status = gpu.run_steps(
        [
            step("fails", "raise SystemExit(4)"),
            step("hangs", hangs, 0.5),
            step("lies", "", why_failed=lambda: "proved nothing"),
            step("lacks a tool", "", why_not=lambda: "missing: nvcc"),
            step("is refused", "", why_not=lambda: "not here", optional=True),
            step("works", mark),
        ],
        tmp_path,
    )
    assert status == 1 and (tmp_path / "ran").exists() and time.monotonic() - start < 30
    outcomes = json.loads((tmp_path / "steps.json").read_text())
    assert [(outcome["status"], outcome["reason"]) for outcome in outcomes] == [
        ("FAILED", "exit status 4"),
        ("FAILED", "took longer than 0 s"),
        ("FAILED", "proved nothing"),
        ("FAILED", "missing: nvcc"),
        ("skipped", "not here"),
        ("passed", ""),
    ]
    out = capfd.readouterr().out
    assert "--- works" in out and "proved nothing" in out
    assert gpu.run_steps([step("is refused", "", why_not=lambda: "not here", optional=True)], tmp_path) == 0


def test_no_time_left_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_SECONDS", 0)
    assert gpu.run_steps([step("works", "")], tmp_path) == 1


def test_the_steps(tmp_path):
    found = gpu.op_steps(tmp_path / "nvidia-h200", "90", 4)
    sanitizers = ["memcheck", "racecheck", "initcheck"]
    names = ["build", "tests on the device", "small calls", *sanitizers, "benchmark", "roofline", "other tests"]
    assert [step.name for step in found] == names
    by_name = {step.name: step for step in found}
    assert "CUDAARCHS=90-real" in by_name["build"].command
    assert [name for name in names if by_name[name].optional] == sanitizers
    for step in found:
        assert all((ROOT / word).exists() for word in step.command if word.startswith("tests/") or word == "setup.py")
    assert gpu._SECONDS < 9 * 60
    assert sum(step.limit for step in found[: names.index("benchmark")]) < gpu._SECONDS - 120
    written = tmp_path / "nvidia-h200/op.json"
    assert cli._parser().parse_args(by_name["benchmark"].command[3:]).json == written
    assert cli._parser().parse_args(by_name["roofline"].command[3:]).results == [written]


def test_the_steps_of_the_pipeline(tmp_path):
    found = gpu.PARTS["pipeline"](tmp_path / "nvidia-h200", "90", 4)
    names = ["build", "tests on the device", "projector", "7B shapes", "embedded model", "reduction", "layouts"]
    assert [step.name for step in found] == names
    assert sum(step.limit for step in found) <= gpu._SECONDS
    for step in found:
        assert all((ROOT / word).exists() for word in step.command if word.startswith("tests/") or word == "setup.py")
    for step in found[2:]:
        args = cli._parser().parse_args(step.command[3:])
        assert args.json.parent == tmp_path / "nvidia-h200" and args.device == "cuda"
    assert found[3].command[found[3].command.index("--config") + 1] == "7b"


BACKENDS = ("cuda", "triton")
REPORT = '<testsuites><testsuite>{}</testsuite></testsuites>'
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
    assert gpu._why_refused(str(refuses)) == "this machine refuses it: Error: Device not supported"
    assert gpu._why_refused(str(works_)) is None
    assert "not found" in gpu._why_refused(str(tmp_path / "none"))


def test_the_reports_names_are_those_of_pytest(tmp_path):
    """What `why_no_proof` looks for is in the names that pytest gives the GPU tests."""
    report = tmp_path / "tests.xml"
    command = [*gpu._pytest(0), "tests/test_gpu.py", "-k", "test_no_channels", f"--junitxml={report}"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert ended.returncode in (0, 5)
    assert "test_no_channels[cuda]" in report.read_text()
    assert gpu.why_no_proof(report, BACKENDS) == "every test of cuda and triton was skipped"


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
    assert bars == [2.3, 2.9, None, None]
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
    assert "published / patched" in capsys.readouterr().out


def test_drop_ins_of_other_tokens_are_not_timed(small_dropins, monkeypatch, capsys):
    def patch(self, model):
        right = model.prepare_slowfast
        model.prepare_slowfast = lambda *call: right(*call) + 1

    monkeypatch.setattr(dropins.Work, "patch", patch)
    assert main(monkeypatch, "dropins", "--rounds", "2", "--only", "prepare_slowfast") == 1
    assert "error: prepare_slowfast" in capsys.readouterr().out


@pytest.fixture
def small_layouts(monkeypatch):
    monkeypatch.setattr(layouts, "_CHANNELS", {"after": 8, "before": 4})


def test_layouts_are_measured_after_their_tokens(small_layouts, tmp_path, monkeypatch, capsys):
    written = tmp_path / "layouts.json"
    assert main(monkeypatch, "layouts", "--rounds", "2", "--only", "float32", "--json", written) == 0
    result = read_result(written)
    assert list(result["works"]) == [str(work) for work in layouts.WORKS if "float32" in str(work)]
    assert not result["errors"] and all(f["providers"]["published"]["ratio"] > 0 for f in result["works"].values())
    assert "pllava float32" in capsys.readouterr().out


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
    assert stream._flatness(np.full(8, 2.0)) == 1.0
    assert stream._flatness(np.arange(1.0, 9.0)) == 3.5 / 7.5
