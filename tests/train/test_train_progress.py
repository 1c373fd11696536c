import io

import pytest
from rich.console import Console

from crosschip.train.progress import LineProgress, Moment, TerminalProgress, describe, open_progress

MOMENT = Moment(step=50, num_steps=200, loss=2.34567, tokens_per_s=4512.3, peak_share=0.412, remaining_s=125.0)


def test_one_line_says_everything() -> None:
    assert describe(MOMENT) == "loss 2.3457  4,512 tokens/s  41.2% of peak  2:05 left"
    assert describe(Moment(1, 9, 1.0, 10.0, None, 7325.0)) == "loss 1.0000  10 tokens/s  2:02:05 left"


def test_without_a_terminal_there_are_few_lines(capsys) -> None:
    progress = LineProgress(interval_s=3600.0)
    progress.start("pretrain", 0, 200)
    for step in range(1, 201):
        progress.advance(Moment(step, 200, 2.0, 10.0, None, 1.0))
    progress.end()
    assert capsys.readouterr().err.splitlines() == ["pretrain step 200/200  loss 2.0000  10 tokens/s  0:01 left"]


def test_lines_come_when_the_interval_is_over(capsys) -> None:
    progress = LineProgress(interval_s=0.0)
    progress.start("sft", 0, 200)
    progress.advance(MOMENT)
    assert "sft step 50/200" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_bar(monkeypatch, is_terminal) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    assert isinstance(open_progress(), TerminalProgress if is_terminal else LineProgress)


def test_the_bar_shows_step_and_numbers_and_lines_go_above_it() -> None:
    progress = TerminalProgress()
    screen = io.StringIO()
    progress._console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    progress.start("pretrain", 40, 200)
    progress.advance(MOMENT)
    progress.say("validation [loss] 2.0")
    progress.end()
    assert "50/200" in screen.getvalue()
    assert "41.2% of peak" in screen.getvalue()
    assert "validation [loss] 2.0" in screen.getvalue()
