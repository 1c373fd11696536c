"""Small operator lists of the known forms, and wheels of any content."""

from __future__ import annotations

import zipfile
from pathlib import Path

NPU_CODEGEN = """\
autograd:
- func: _thnn_fused_gru_cell(Tensor input_gates) -> (Tensor, Tensor)
  impl_ns: op_api
backend: NPU
cpp_namespace: at_npu::native
custom:
- func: npu_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor
supported:
- func: mm(Tensor self, Tensor mat2) -> Tensor
  op_api: true
- func: mul.out(Tensor self, Tensor other, *, Tensor(a!) out) -> Tensor(a!)
- func: _fused_adam_(Tensor(a!)[] self) -> ()
- add.Tensor
symint:
- embedding
"""
NPU_CORE = "backend: NPU\nsupported:\n  - as_strided\n  - func: clone\n    op_api: True\n"
MLU = """\
aten:
  - func: mm
    structured_delegate: mm.out
  - func: mm.out
    structured: True
  - func: sparse_mask
    dispatch: SparsePrivateUse1
  - func: addmm
    dispatch: PrivateUse1, SparsePrivateUse1
vision:
  - func: nms
custom:
"""
CODEGEN = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
CORE = "torch_npu/csrc/aten/npu_native_functions.yaml"
METADATA = "torch_npu-2.13.0.dist-info/METADATA"
MEMBERS = {CODEGEN: NPU_CODEGEN, CORE: NPU_CORE, METADATA: "Metadata-Version: 2.4\nName: torch_npu\nVersion: 2.13.0\n"}


def make_wheel(path: Path, members: dict[str, str | bytes] | None = None) -> Path:
    """A wheel of these members; the small torch_npu wheel if none are given."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in (MEMBERS if members is None else members).items():
            wheel.writestr(name, content)
    return path
