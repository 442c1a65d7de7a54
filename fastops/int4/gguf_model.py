"""A transformers model's linear layers from the GGUF file it was converted from: what the file holds in 4 bits stays as
it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastops.int4.importers import from_gguf
from fastops.int4.model import activations_of, quantizable, quantize_model
from fastops.int4.weight import FLOATS, Int4Weight

KINDS = ("Q4_0", "Q4_K")


def load_gguf(
    model: Any,
    path: str | Path,
    *,
    skip: tuple[str, ...] = (),
    activations: str = "float",
    float_activations: tuple[str, ...] = (),
    bfloat16_activations: tuple[str, ...] = (),
    scale_dtype: torch.dtype = torch.float16,
    progress: Any = None,
) -> dict[str, str]:
    """Replaces the linear layers of `model` by `Int4Linear`, in place, in the widths of the GGUF file `path`.

    A layer that the file holds as Q4_0 or Q4_K gets the file's own codes. Every other one (Q5_0, Q6_K, Q8_0, F16, ...)
    is rounded to 8 bits with a scale for each output feature, from the weight the model has.

    Args:
        model: a transformers model with this file's weights: ``from_pretrained(folder, gguf_file=...)``, or a
            conversion of it. Needs the `gguf` package, for the file and for its names.
        skip, activations, float_activations, bfloat16_activations, progress: as in `fastops.int4.quantize_model`.
        scale_dtype: of the 4-bit layers' scales and mins; torch.float32 keeps Q4_K bit for bit (6 bits a weight
            instead of 5).

    Returns:
        For each layer replaced its name and the file's type of it ("" where the file has no tensor of that name, e.g.
        of an output layer that is the embedding).

    Raises:
        ValueError: a file that is damaged or of an architecture the `gguf` package does not name, or a tensor that is
            not the model's weight; names it. TypeError: another scale_dtype. ImportError: no `gguf` package.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    if scale_dtype not in FLOATS:
        raise TypeError(f"load_gguf: scale_dtype is {scale_dtype}, must be float32, float16 or bfloat16")
    reader = _open(Path(path))
    field = reader.get_field("general.architecture")
    name = str(field.contents()) if field is not None else ""
    arch = next((a for a, n in MODEL_ARCH_NAMES.items() if n == name), None)
    if arch is None:
        raise ValueError(f"load_gguf: {path} has architecture {name!r}, which the gguf package does not know")
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {t.name: t for t in reader.tensors}
    kinds: dict[str, str] = {}
    four: dict[str, Int4Weight] = {}
    for layer, linear in quantizable(model, skip, -1):
        tensor = tensors.get(f"{names.get_name(layer) or ''}.weight")
        kinds[layer] = "" if tensor is None else tensor.tensor_type.name
        if tensor is not None and kinds[layer] in KINDS:
            four[layer] = _exact(name, layer, linear, tensor, model.config, scale_dtype)
    from fastops.nn import Int4Linear

    for layer, weight in four.items():
        parent, _, child = layer.rpartition(".")
        linear = model.get_submodule(layer)
        mode = activations_of(layer, activations, float_activations, bfloat16_activations)
        setattr(model.get_submodule(parent) if parent else model, child, Int4Linear(weight, linear.bias, mode))
    quantize_model(
        model, skip=skip, eight=("",), activations=activations, float_activations=float_activations,
        bfloat16_activations=bfloat16_activations, group_size=-1, progress=progress,
    )  # fmt: skip
    return kinds


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    if not path.exists():
        raise FileNotFoundError(f"load_gguf: {path} does not exist")
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ValueError(f"load_gguf: {path} is damaged or no GGUF file: {error}") from error


def _exact(
    arch: str, layer: str, linear: nn.Linear, tensor: Any, config: Any, scale_dtype: torch.dtype
) -> Int4Weight:  # fmt: skip
    """The file's codes, in the order of the model's rows."""
    shape = (linear.out_features, linear.in_features)
    held = tuple(int(s) for s in reversed(tensor.shape))
    if held != shape:
        raise ValueError(f"load_gguf: {tensor.name} is {list(held)}, {layer} is {list(shape)}")
    raw = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(shape[0], -1)
    if arch == "llama" and layer.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
        raw = _neox_rows(raw, heads)
    weight = from_gguf(raw, tensor.tensor_type.name, shape)
    mins = None if weight.mins is None else weight.mins.to(scale_dtype)
    try:
        weight = Int4Weight(weight.codes, weight.scales.to(scale_dtype), mins=mins)
    except ValueError as error:  # numbers that scale_dtype cannot hold
        raise ValueError(f"load_gguf: {tensor.name}: {error}") from error
    got, want = weight.dequantize(), linear.weight.detach().float()
    if not torch.allclose(got, want, rtol=2.0**-7, atol=2.0**-7 * float(want.abs().max())):
        raise ValueError(f"load_gguf: {tensor.name} is not the weight of {layer}: the model is not of this file")
    return weight


def _neox_rows(raw: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps the rows of each head of a Llama's q and k as pairs of neighbours; transformers as two halves."""
    return raw.view(heads, -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape)
