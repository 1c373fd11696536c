from __future__ import annotations

from typing import Any

from crosschip.qualify.judging.condition import causes


def case(length: int, mask: str, layout: str = "plain") -> dict[str, Any]:
    return {"length": length, "mask": mask, "layout": layout}


CASES = [
    case(length, mask, layout) for length in (1, 16, 64, 65, 512) for mask in ("none", "S", "TS") for layout in "ab"
]


def explained(fails: Any) -> list[str]:
    failing = [each for each in CASES if fails(each)]
    return [str(cause) for cause in causes(failing, [each for each in CASES if not fails(each)])]


def test_one_condition() -> None:
    assert explained(lambda each: each["mask"] == "TS") == ["where mask is TS"]
    assert explained(lambda each: each["length"] > 64) == ["where length more than 64"]


def test_two_conditions_together() -> None:
    assert explained(lambda each: each["mask"] != "none" and each["length"] > 64) == [
        "where length more than 64 and mask is not none"
    ]


def test_two_causes() -> None:
    found = explained(lambda each: each["mask"] == "TS" or each["length"] == 512)
    assert sorted(found) == ["where length more than 65", "where mask is TS"]


def test_always_and_never() -> None:
    assert explained(lambda each: True) == ["in every case"]
    assert causes([], CASES) == []


def test_a_case_that_could_not_show_it_does_not_hide_the_condition() -> None:
    blind = CASES.index(case(64, "TS", "a"))
    found = explained(lambda each: each["mask"] == "TS" and each is not CASES[blind])
    assert found == ["mostly where mask is TS"]


def test_members_point_at_the_failing_cases() -> None:
    failing = [each for each in CASES if each["mask"] == "S"]
    (cause,) = causes(failing, [each for each in CASES if each["mask"] != "S"])
    assert cause.members == tuple(range(len(failing)))
