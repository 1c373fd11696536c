"""The page says what the documents say, says plainly what is missing, and never executes what a model wrote."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crosschip.report import voyage_summary, write_run_page
from crosschip.rundir import RunDirectory, read_json, write_json

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


class PageReader(HTMLParser):
    """Visible text, tags and ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text.append(data)


def read_page(run: RunDirectory) -> tuple[str, PageReader]:
    reader = PageReader()
    reader.feed(write_run_page(run).read_text(encoding="utf-8"))
    # narrow and ordinary spaces alike, so that assertions can be read
    return re.sub(r"\s+", " ", "".join(reader.text)), reader


def test_whole_run_is_told(whole_run: RunDirectory) -> None:
    text, page = read_page(whole_run)
    assert "Every step finished" in text
    assert "175 of 200 right, 87.5 % (95 % interval 82 % to 91 %)" in text
    assert "199 of 200 greedy answers are the same, token by token" in text
    assert "4 915 200" in text  # 600 steps of 8,192 tokens
    assert "3 min 48 s" in text  # 600 steps of 0.38 s
    assert "EPYC 7763" in text
    assert "What is 20 + 24?" in text
    assert "expected 44" in text
    assert "UNCERTIFIED" in text
    assert f"crosschip chat {whole_run.handoff('hf')}" in text
    assert page.tags.count("svg") == 12  # six plots in each of two stages


def test_page_is_one_file_without_outside_references(whole_run: RunDirectory) -> None:
    page = write_run_page(whole_run).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#)[^)]*\)", page) == []
    assert "<script" not in page


def test_ids_are_unique_and_plots_are_named(whole_run: RunDirectory) -> None:
    _, page = read_page(whole_run)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("title") == 1 + page.tags.count("svg")


def test_hostile_text_stays_text(whole_run: RunDirectory) -> None:
    sample = {"step": 600, "prompt": HOSTILE, "text": HOSTILE}
    (whole_run.stage("pretrain") / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    evaluation = read_json(whole_run.evaluation)
    for row in evaluation["problems"]:
        row.update(question=HOSTILE, text=f"<think>{HOSTILE}</think>{HOSTILE}", expected=HOSTILE)
    write_json(whole_run.evaluation, evaluation)
    voyage = read_json(whole_run.path / "voyage.json")
    voyage["agreement"]["differences"][0].update(question=HOSTILE, before=HOSTILE, after=HOSTILE)
    voyage["steps"][0]["outcome"] = HOSTILE
    write_json(whole_run.path / "voyage.json", voyage)
    text, page = read_page(whole_run)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert text.count("<script>") >= 20  # shown as the text it is


def test_only_pretraining(whole_run: RunDirectory) -> None:
    recipe = read_json(whole_run.resolved_recipe)
    recipe.update(sft=None, evaluate=None)
    write_json(whole_run.resolved_recipe, recipe)
    for extra in ("train/sft", "handoff"):
        shutil.rmtree(whole_run.path / extra)
    whole_run.evaluation.unlink()
    (whole_run.path / "voyage.json").unlink()
    text, _ = read_page(whole_run)
    assert "Every stage finished" in text
    assert "There was no fine-tuning stage" in text
    assert "The model was not asked held-out problems" in text
    assert "not been handed off" in text
    assert "No fingerprint was recorded" in text


def test_run_in_progress(whole_run: RunDirectory, add_line: Callable[[Path, bytes], None]) -> None:
    metrics = whole_run.stage("pretrain") / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:120]))
    add_line(metrics, b'{"step": 121, "lo')
    shutil.rmtree(whole_run.stage("sft"))
    (whole_run.path / "voyage.json").unlink()
    text, _ = read_page(whole_run)
    assert "Pre-training, step 120 of 600" in text
    assert "Fine-tuning, not started" in text
    assert "train/pretrain/metrics.jsonl: line 121 was skipped: it is unfinished" in text


def test_damaged_lines_are_named_and_counted(whole_run: RunDirectory, add_line: Callable[[Path, bytes], None]) -> None:
    metrics = whole_run.stage("sft") / "metrics.jsonl"
    add_line(metrics, b"not json\n" + b"[1, 2]\n" + b"\xff\xfe\n" + b"{broken\n" * 7)
    text, _ = read_page(whole_run)
    assert "train/sft/metrics.jsonl: line 201 was skipped: Expecting value" in text
    assert "line 202 was skipped: it holds a list where an object belongs" in text
    assert "5 more damaged lines were skipped (10 of 210 in all)" in text


def test_undamaged_run_has_no_notes(whole_run: RunDirectory) -> None:
    text, _ = read_page(whole_run)
    assert "was skipped" not in text
    assert "Notes on the documents" not in text


def test_non_finite_loss_is_told(whole_run: RunDirectory, add_line: Callable[[Path, bytes], None]) -> None:
    add_line(whole_run.stage("sft") / "metrics.jsonl", b'{"step": 201, "loss": NaN, "gradient_norm": Infinity}\n')
    text, _ = read_page(whole_run)
    assert "Fine-tuning: loss was not a finite number at 1 steps" in text


def test_newer_voyage_is_refused_by_name(whole_run: RunDirectory) -> None:
    write_json(whole_run.path / "voyage.json", {"schema_version": 99, "steps": "of another shape"})
    text, _ = read_page(whole_run)
    assert "voyage.json has schema version 99; this crosschip reads up to 1" in text


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"steps": null}', '{"agreement": 3, "chips": []}'])
@pytest.mark.parametrize("name", ["voyage.json", "evaluation.json", "resolved.json"])
def test_damaged_documents_never_crash(whole_run: RunDirectory, name: str, content: str) -> None:
    shutil.rmtree(whole_run.path / "train")  # plots take most of the time and have nothing to do with it
    (whole_run.path / name).write_text(content)
    text, _ = read_page(whole_run)
    assert "first" in text
    voyage_summary(whole_run)


def test_empty_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "nothing").mkdir(parents=True)
    text, _ = read_page(RunDirectory(tmp_path / "runs" / "nothing"))
    assert "Nothing has been trained yet" in text
    assert "resolved.json, the recipe after overrides, is not there" in text


def test_failed_step_is_at_the_top(whole_run: RunDirectory) -> None:
    voyage = read_json(whole_run.path / "voyage.json")
    voyage["steps"] = [
        *voyage["steps"][:2],
        {"name": "evaluate", "title": "Evaluate", "state": "failed", "outcome": "no disk"},
    ]
    write_json(whole_run.path / "voyage.json", voyage | {"finished": False})
    text, _ = read_page(whole_run)
    assert "Stopped in step “Evaluate”: no disk" in text
    assert "Every step finished" not in text


def test_examinations_of_chips_are_told_with_their_pages(whole_run: RunDirectory) -> None:
    assert "The chips were not qualified" in read_page(whole_run)[0]
    report = whole_run.qualification("cpu", "train")
    write_json(report, {"schema_version": 1, "chip": HOSTILE, "role": "train", "tier": "smoke", "verdict": "FAIL"})
    (report.parent / "torn.json").write_text("{")
    text, page = read_page(whole_run)
    assert "The chips were not qualified" not in text
    assert f"{HOSTILE} to train, smoke tier: FAIL" in text
    assert "torn.json cannot be read" in text
    assert "a" not in page.tags
    report.with_suffix(".html").write_text("a page")
    assert "a" in read_page(whole_run)[1].tags
    assert 'href="qualify/cpu-train.html"' in whole_run.index_page.read_text(encoding="utf-8")


def test_long_run_stays_light(whole_run: RunDirectory) -> None:
    rows = (f'{{"step": {step}, "loss": {9 if step == 70_000 else 1}}}\n' for step in range(1, 100_001))
    (whole_run.stage("pretrain") / "metrics.jsonl").write_text("".join(rows))
    page = write_run_page(whole_run)
    assert page.stat().st_size < 400_000
    assert "highest 9" in page.read_text(encoding="utf-8")  # a single spike survives the thinning


def test_summary_tells_score_times_and_how_to_chat(whole_run: RunDirectory) -> None:
    summary = re.sub(r"[^\S\n]+", " ", voyage_summary(whole_run))
    assert "175 of 200 right" in summary
    assert "Train 5 min 31 s" in summary
    assert str(whole_run.index_page) in summary
    assert f"crosschip serve {whole_run.handoff('hf')}" in summary


def test_no_torch_and_no_plots_before_they_are_needed() -> None:
    code = "import sys, crosschip.report; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
