"""A file of questions answered in worker processes, resumed, and scored.

    python examples/batch.py

The same as `sfllava-fast batch` and `sfllava-fast score`, with the embedded model and its sample video. Needs the
extras [video] and [llava].
"""

import json
import tempfile
from pathlib import Path

from sfllava_fast.cli.main import main
from sfllava_fast.embedded import sample_answers, sample_questions, sample_video


def run() -> None:
    """Answer, answer again, score. Workers are processes that import this file: hence the check of __name__ below."""
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder, "questions.jsonl"), Path(folder, "answers.jsonl")
        lines = [
            {
                "id": number,
                "video": sample_video().name,
                "question": question,
                "choices": [truth, "no idea"],
                "answer": truth,
            }
            for number, (question, truth) in enumerate(zip(sample_questions(), sample_answers(), strict=True))
        ]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))

        command = ["batch", str(questions), "--videos", str(sample_video().parent), "--out", str(answers)]
        print("exit code:", main([*command, "--workers", "2"]))  # 0: every question has an answer
        answered = [json.loads(line) for line in answers.read_text().splitlines()]
        for line in answered[:2]:
            print(f"  {line['question']} -> {line['answer']}")

        print("again:", main(command))  # every id has its line: nothing is asked a second time
        print("lines:", len(answers.read_text().splitlines()), "of", len(lines))
        print("scored:", main(["score", str(answers)]))  # the share of right answers


if __name__ == "__main__":
    run()
