"""The plan's page: every number with its unit and origin, one file, nothing from outside, hostile names escaped."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from crosschip.plan.page import plan_page
from tests.plan.page.plans import plan_document

HOSTILE = '"><script>document.title="taken"</script><img src=https://example.com/x onerror=alert(1)>'


def test_the_document_is_json_and_the_page_shows_its_dates() -> None:
    document = json.loads(json.dumps(plan_document()))
    page = plan_page(document)
    for name in ("p10", "p50", "p90"):
        assert document["dates"]["end"][name] in page
    for each in document["fall_backs"][0]["milestones"]:
        assert each["words"] in page
    assert page.count("<svg") == 4


def test_every_number_that_was_put_in_has_a_unit_an_origin_and_a_source() -> None:
    document = plan_document()
    page = plan_page(document)
    figures = document["failures"]["figures"]
    assert len(figures) > 10
    for name, each in figures.items():
        assert each["origin"] in ("measured", "published", "assumed", "given", "computed")
        assert each["unit"]
        assert each["source"]
        row = re.search(rf"<tr><td[^>]*><span>{name.replace('_', ' ')}</span>.*?</tr>", page)
        assert row is not None, name
        assert each["unit"] in row.group()
        assert each["origin"] in row.group()


def test_nothing_is_fetched_and_nothing_runs() -> None:
    document: dict[str, Any] = copy.deepcopy(plan_document())
    document["model"] = document["cluster"] = HOSTILE
    document["notes"] = [HOSTILE]
    document["dates"]["stages"][0]["name"] = document["sensitivity"][0]["change"] = HOSTILE
    document["sensitivity"][0]["words"] = HOSTILE
    page = plan_page(document)
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_shares_of_time_add_up_on_the_page() -> None:
    shares = plan_document()["failures"]["time_shares"]
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("section", ["failures", "dates", "sensitivity", "fall_backs", "money", "serving", "notes"])
def test_a_section_that_is_missing_is_left_out(section: str) -> None:
    document = {key: value for key, value in plan_document().items() if key != section}
    assert "DeepSeek-V3" in plan_page(document)
