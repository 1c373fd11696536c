"""Small charts: what is drawn lies within their axes."""

from __future__ import annotations

import matplotlib
import pytest

from crosschip.report.curves import Series, thin
from crosschip.report.plots import Plot, draw


def chart(marks: Series | None) -> str:
    curve = thin(Series([1, 2, 3], [0.2, 0.3, 0.25], 0))
    return draw(Plot("p", "title", "description", curve, marks, from_zero=True))


def test_marks_above_the_line_are_within_the_axes() -> None:
    assert ">0.6<" in chart(Series([0, 3], [0.65, 0.7], 0))
    assert ">0.6<" not in chart(None)


@pytest.mark.parametrize("setting", [{"text.usetex": True}, {"axes.prop_cycle": "cycler(color='r')", "font.size": 3}])
def test_settings_of_the_user_s_own_figures_do_not_reach_ours(setting: dict[str, object]) -> None:
    drawn = chart(None)
    with matplotlib.rc_context(setting):
        assert chart(None) == drawn
        assert all(matplotlib.rcParams[key] == matplotlib.RcParams(setting)[key] for key in setting)
