"""The fingerprint: a JSON document with everything a measurement may depend on, and nothing that it need not tell."""

from __future__ import annotations

import json

import pytest
import torch

from crosschip.chips import find_chip, fingerprint
from crosschip.chips.fingerprint import working_dtypes

CPU = find_chip("cpu")


def test_it_is_json_and_says_what_matters() -> None:
    document = fingerprint(CPU)
    assert json.loads(json.dumps(document)) == document
    assert document["chip"]["name"] == "cpu"
    assert document["chip"]["memory_bytes"] == document["host"]["memory_bytes"] > 0
    assert document["software"]["torch"] == torch.__version__
    assert document["threads"]["intra_op"] == torch.get_num_threads()
    assert document["host"]["usable_cores"] >= 1


def test_it_is_the_same_twice_and_another_when_a_switch_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_DETERMINISTIC", raising=False)
    before = fingerprint(CPU)
    assert fingerprint(CPU) == before
    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    assert fingerprint(CPU)["switches"] == {**before["switches"], "HCCL_DETERMINISTIC": "true"}


def test_other_variables_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "secret")
    assert "secret" not in json.dumps(fingerprint(CPU))


def test_dtypes_are_tried() -> None:
    found = working_dtypes(CPU)
    assert (found["float32"], found["float64"], found["bfloat16"]) == ("computes",) * 3


def test_a_dtype_that_comes_back_wrong_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", lambda left, right: left)
    assert working_dtypes(CPU)["float32"] == "stores"


def test_a_dtype_that_cannot_be_put_there_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.Tensor.to

    def refuse(self: torch.Tensor, *args: object) -> torch.Tensor:
        if args[0] == torch.float64:
            raise TypeError("the chip has no float64")
        return honest(self, *args)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    assert working_dtypes(CPU)["float64"] == "no"
