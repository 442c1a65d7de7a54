"""fastops: attention and GEMM operators, first-class on every machine. See README.md and docs/."""

from fastops.dispatch import explain, override
from fastops.dispatch.override import read_environment as _read_environment
from fastops.errors import FallbackWarning, NotSupportedError
from fastops.info import info, set_isa, use_isa
from fastops.ops.attention import attention
from fastops.ops.attention_paged import attention_paged
from fastops.ops.attention_varlen import attention_varlen
from fastops.ops.merge_states import merge_states
from fastops.ops.scale_add import scale_add
from fastops.ops.sdpa import scaled_dot_product_attention

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "NotSupportedError",
    "attention",
    "attention_paged",
    "attention_varlen",
    "explain",
    "info",
    "merge_states",
    "override",
    "scale_add",
    "scaled_dot_product_attention",
    "set_isa",
    "use_isa",
]

_read_environment()
