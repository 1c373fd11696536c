from __future__ import annotations

import pytest
import torch

from crosschip.model import matrix
from crosschip.model.matrix import Matrix
from tests.model.configs import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (16,), (3, 5), (300,)])
def test_packed_and_plain_products_are_the_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    weight, bias, x = torch.randn(70, 33).to(dtype), torch.randn(70).to(dtype), torch.randn(*rows, 33).to(dtype)
    expected = x.double() @ weight.double().t() + bias.double()
    for packs in (matrix._can_pack(dtype), False):
        monkeypatch.setattr(matrix, "_can_pack", lambda dtype, packs=packs: packs)
        found = Matrix(weight, bias)(x)
        assert found.shape == (*rows, 70)
        assert relative_error(found, expected) < 2 * torch.finfo(dtype).eps


def test_a_build_whose_packed_product_is_wrong_or_missing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise NotImplementedError

    for broken in (missing, lambda x, packed, bias: torch.zeros(3, 24)):
        matrix._can_pack.cache_clear()
        monkeypatch.setattr(matrix, "_packed_product", broken)
        assert not matrix._can_pack(torch.float32)
    matrix._can_pack.cache_clear()
