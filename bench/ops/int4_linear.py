"""int4_linear at layers of Llama 3 8B, groups of 128, against torch's int4 product and dense linear, and ONNX Runtime's
MatMulNBits where onnxruntime and onnx are installed."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import BARS, Shape

GROUP = 128


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    if shapes and shapes[0].d == 16:
        layers, rows = [(64, 128)], [1, 8]
    elif any(s in BARS[:-1] for s in shapes):
        layers, rows = [(4096, 4096), (14336, 4096)], [1, 16, 64, 256]
    else:
        layers, rows = [(4096, 4096)], [1, 64]
    plain = [
        _case(n, k, m, name, mode)
        for n, k in layers
        for m in rows
        for name in dtypes
        for mode in ("float", "int8")
        if mode == "float" or name == "fp32"
    ]
    forms = [
        _form(*layers[0], m, mode, form)
        for m in rows[:2]
        for mode in ("float", "int8")
        for form in FORMS
        if "fp32" in dtypes
    ]
    return plain + forms


FORMS = ("2:4", "per input")


def _again(inputs: Any) -> Any:
    """Copies, the weights packed anew: quantizing once is enough."""
    copies = copy.deepcopy(inputs)
    for each in copies:
        if isinstance(each, fastops.Int4Weight):
            each.packed()
    return copies


def _form(n: int, k: int, m: int, mode: str, form: str) -> Case:
    """A 2:4 sparse weight, or one with groups of outputs, beside the same as a plain one and torch's dense product."""
    bits = 3.0 if form == "2:4" else 4.0

    def make() -> Any:
        w = torch.randn(n, k) / k**0.5
        parts = fastops.int4.quantize(w, GROUP, sparsity="2:4" if form == "2:4" else None).state_dict()
        if form == "2:4":
            codes = fastops.int4.spread24(fastops.int4.unpack_pairs(parts["codes"]), parts["kept"])
            plain = {"codes": fastops.int4.pack_pairs(codes), "scales": parts["scales"]}
        else:  # scales of one, so that the results can be compared
            plain = dict(parts)
            parts["column_scales"] = torch.ones(n // GROUP or 1, k)
        weights = [fastops.Int4Weight.from_state_dict(each) for each in (parts, plain)]
        for each in weights:
            each.packed()
        return torch.randn(m, k), *weights, weights[0].dequantize()

    run = {
        "fastops": lambda x: fastops.int4_linear(x[0], x[1], activations=mode),
        "int4": lambda x: fastops.int4_linear(x[0], x[2], activations=mode),
        "dense": lambda x: F.linear(x[0], x[3]),
    }
    stored = n * k * bits / 8 + n * k / GROUP * 4.0
    kind, label = "memory" if m == 1 else "compute", f"{form} {mode} M{m} N{n} K{k} g{GROUP}"
    bytes_ = stored + 4.0 * m * (n + k)
    tags = frozenset({f"int4-{form}"})
    return Case("int4_linear", label, "fp32", kind, 2.0 * m * n * k, bytes_, make, run, tags, _again)


def _case(n: int, k: int, m: int, name: str, mode: str) -> Case:
    dtype = DTYPES[name]
    size = torch.empty(0, dtype=dtype).element_size()
    stored = n * k / 2 + n * k / GROUP * 2.0

    def make() -> Any:
        w = torch.randn(n, k) / k**0.5
        q = fastops.int4.quantize(w, GROUP, scale_dtype=torch.float16)
        q.packed()
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fastops.int4.unpack_pairs(q.codes).int(), 2)
        scales = torch.stack((q.scales.T, torch.zeros_like(q.scales.T)), -1).to(dtype).contiguous()
        x = torch.randn(m, k).to(dtype)
        return x, q, theirs, scales, w.to(dtype), {}

    run = {
        "fastops": lambda x: fastops.int4_linear(x[0], x[1], activations=mode),
        "torch": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x[0], x[2], GROUP, x[3]),
        "dense": lambda x: F.linear(x[0], x[4]),
    }
    if name == "fp32" and find_spec("onnxruntime") and find_spec("onnx"):
        run["onnxruntime"] = lambda x: _onnx(x, n, k, 4 if mode == "int8" else 1)
    kind = "memory" if m == 1 else "compute"
    tag = f"int4-{mode}-" + ("stream" if m == 1 else "panel")
    label = f"{mode} M{m} N{n} K{k} g{GROUP}"
    bytes_ = stored + size * m * (n + k)
    tags = frozenset({tag, f"{tag}-{name}"})
    return Case("int4_linear", label, name, kind, 2.0 * m * n * k, bytes_, make, run, tags, _again)


def _onnx(x: Any, n: int, k: int, accuracy: int) -> Any:
    """Runs x[0] through a session made at the first call."""
    kept = x[5]
    if "run" not in kept:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        codes = x[1].codes.view(n, k // GROUP, GROUP // 2).numpy()
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=GROUP,
            accuracy_level=accuracy,
        )  # fmt: skip
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
            [numpy_helper.from_array(codes, "b"), numpy_helper.from_array(x[1].scales.float().flatten().numpy(), "s")],
        )  # fmt: skip
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its waiting threads would spin on the cores the other candidates run on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        rows = x[0].numpy()
        kept["run"] = lambda: session.run(None, {"x": rows})[0]
    return torch.from_numpy(kept["run"]())
