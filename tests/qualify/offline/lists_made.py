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
OP_PLUGIN = """\
all_version: [v2.1, v2.12, v2.13]
official:
  - func: exp(Tensor self) -> Tensor
    acl_op: all_version
    gen_opapi:
      exec: aclnnExp
  - func: cumsum(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor
    op_api: [v2.1, newest]
  - func: _foreach_norm.Scalar(Tensor[] tensors, Scalar ord=2) -> Tensor[]
    op_api: v2.1, v2.12
  - func: _cdist_forward(Tensor x1, Tensor x2, float p, int? compute_mode) -> Tensor
    acl_op: [v2.1, v2.12]
  - func: silu(Tensor self) -> Tensor
    acl_op: [v2.1, v2.12]
    op_api: v2.12, v2.13
custom:
  - func: npu_rotary_mul(Tensor self, Tensor r1, Tensor r2) -> Tensor
    op_api: [v2.1, v2.13]
    exposed: all_version
symint:
quant:
  - func: quantize_per_tensor(Tensor self, float scale, int zero_point, ScalarType dtype) -> Tensor
    acl_op: v2.1
"""
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
OP_PLUGIN_FILE = "third_party/op-plugin/op_plugin/config/op_plugin_functions.yaml"
METADATA = "torch_npu-2.13.0.dist-info/METADATA"
MEMBERS = {CODEGEN: NPU_CODEGEN, CORE: NPU_CORE, METADATA: "Metadata-Version: 2.4\nName: torch_npu\nVersion: 2.13.0\n"}


def make_source(directory: Path, members: dict[str, str]) -> Path:
    """A directory of these files."""
    for name, content in members.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def make_wheel(path: Path, members: dict[str, str | bytes] | None = None) -> Path:
    """A wheel of these members; the small torch_npu wheel if none are given."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in (MEMBERS if members is None else members).items():
            wheel.writestr(name, content)
    return path
