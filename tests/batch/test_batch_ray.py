"""Batches whose workers are Ray actors: the same outputs, and attempts that Ray does not repeat."""

import json
from collections import Counter
from functools import partial

import clips
import pytest
from batch_answerers import asked, make_nothing, make_obedient

from sfllava_fast.batch.questions import Question, by_video
from sfllava_fast.batch.run import run
from sfllava_fast.cli import main as cli
from sfllava_fast.errors import BackendError, CheckpointError

try:
    import ray

    from sfllava_fast.batch.ray_workers import RayWorker
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="needs Ray")


@pytest.fixture(scope="module")
def cluster():
    from pathlib import Path

    ray.init(
        num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": str(Path(clips.__file__).parent)}}, log_to_driver=False
    )
    yield
    ray.shutdown()


@needs_ray
def test_actors_answer_and_are_quarantined_as_processes_are(cluster, tmp_path):
    out, log = tmp_path / "a.jsonl", tmp_path / "asked"
    words = {
        "a": ["ok", "ok"],
        "b": ["die SIGKILL", "ok"],
        "c": ["hang"],
        "d": ["refuse", "ok"],
        "e": ["bug ZeroDivisionError"],
    }
    rows = [(f"{video}{i}", video, text) for video, texts in words.items() for i, text in enumerate(texts)]
    groups = by_video(Question(*row) for row in rows)
    make = partial(make_obedient, log=log)
    table, complete = run(groups, out, {}, make, 2, attempts=2, timeout=3.0, start=RayWorker)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not complete and Counter(line["id"] for line in lines) == Counter(key for key, *_ in rows)
    by_id = {line["id"]: line for line in lines}
    assert [key for key in by_id if by_id[key]["ok"]] == [key for key in by_id if key in ("a0", "a1", "d1")]
    assert by_id["b0"]["attempts"] == by_id["c0"]["attempts"] == by_id["e0"]["attempts"] == 2
    assert "the actor ended" in by_id["b0"]["error"] and by_id["c0"]["error"] == "no answer within 3 seconds"
    assert by_id["b1"]["quarantined"] and by_id["e0"]["error"] == "ZeroDivisionError: a bug"
    # Every attempt was ours: nothing was asked behind the batch's back.
    assert Counter(key for key, _ in asked(log)) == {"a0": 1, "a1": 1, "b0": 2, "c0": 2, "d0": 1, "d1": 1, "e0": 2}


@needs_ray
def test_a_model_that_cannot_be_loaded_in_an_actor(cluster, tmp_path):
    groups = by_video([Question(1, "v", "ok")])
    with pytest.raises(BackendError, match="there is no model"):
        run(groups, tmp_path / "a.jsonl", {}, partial(make_nothing, error=CheckpointError), start=RayWorker)
    assert not list(tmp_path.iterdir())


@needs_ray
def test_from_the_command_line_the_answers_are_those_of_processes(cluster, tmp_path):
    from sfllava_fast import embedded

    path = tmp_path / "q.jsonl"
    rows = [{"id": i, "video": "sample", "question": text} for i, text in enumerate(embedded.sample_questions()[:3])]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answers = []
    for name, ray_flag in (("a", ["--ray"]), ("b", [])):
        out = tmp_path / f"{name}.jsonl"
        folder = embedded.sample_video().parent
        argv = ["batch", path, "--videos", folder, "--out", out, "--frames", 8, *ray_flag]
        assert cli.main(list(map(str, argv))) == 0
        answers.append({line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1] and len(set(answers[0].values())) > 1


@pytest.mark.skipif(ray is not None, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 1, "video": "v", "question": "?"}\n')
    assert cli.main(["batch", str(path), "--out", str(tmp_path / "a.jsonl"), "--ray"]) == 2
    assert "needs Ray: pip install 'ray>=2.40'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
