"""fastops: attention and GEMM operators, first-class on every machine. See README.md and docs/."""

from fastops import _cuda, int4, kv, lut, nn
from fastops.dispatch import explain, override
from fastops.dispatch.override import read_environment as _read_environment
from fastops.errors import FallbackWarning, NotSupportedError
from fastops.info import info, set_isa, use_isa
from fastops.int4 import Int4Weight
from fastops.lut import LutWeight
from fastops.ops.attention import attention
from fastops.ops.attention_paged import attention_paged
from fastops.ops.attention_varlen import attention_varlen
from fastops.ops.gated import geglu, gelu_and_mul, silu_and_mul, swiglu
from fastops.ops.int4_linear import int4_linear
from fastops.ops.kv_append import kv_append
from fastops.ops.linear_cross_entropy import linear_cross_entropy
from fastops.ops.lut_linear import lut_linear
from fastops.ops.merge_states import merge_states
from fastops.ops.norm import add_rms_norm, fused_add_rms_norm, layer_norm, rms_norm
from fastops.ops.rope import apply_rope, qk_norm_rope
from fastops.ops.scale_add import scale_add
from fastops.ops.sdpa import scaled_dot_product_attention

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "Int4Weight",
    "LutWeight",
    "NotSupportedError",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_paged",
    "attention_varlen",
    "explain",
    "fused_add_rms_norm",
    "geglu",
    "gelu_and_mul",
    "info",
    "int4",
    "int4_linear",
    "kv",
    "kv_append",
    "layer_norm",
    "linear_cross_entropy",
    "lut",
    "lut_linear",
    "merge_states",
    "nn",
    "override",
    "qk_norm_rope",
    "rms_norm",
    "scale_add",
    "scaled_dot_product_attention",
    "set_isa",
    "silu_and_mul",
    "swiglu",
    "use_isa",
]

_read_environment()
if _cuda.AVAILABLE:
    _cuda.define_plain()
