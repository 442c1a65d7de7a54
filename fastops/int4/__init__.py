"""4-bit weights: the logical form (`Int4Weight`), quantisation, importers of public checkpoints, whole models.

weight = fastops.int4.quantize(linear.weight, group_size=128)
y = fastops.int4_linear(x, weight)
"""

from fastops.int4.gguf_model import load_gguf
from fastops.int4.importers import from_awq, from_compressed_tensors, from_gguf, from_gptq, from_hqq
from fastops.int4.model import quantize_model
from fastops.int4.quantize import METHODS, quantize
from fastops.int4.weight import BLOCK, Int4Weight, gather24, pack_pairs, spread24, unpack24, unpack_codes, unpack_pairs

__all__ = [
    "BLOCK",
    "METHODS",
    "Int4Weight",
    "from_awq",
    "from_compressed_tensors",
    "from_gguf",
    "from_gptq",
    "from_hqq",
    "gather24",
    "load_gguf",
    "pack_pairs",
    "quantize",
    "quantize_model",
    "spread24",
    "unpack24",
    "unpack_codes",
    "unpack_pairs",
]
