"""4-bit weights through ``from_pretrained``:

from fastops.integrations.transformers import FastopsInt4Config
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=FastopsInt4Config(group_size=32))
model.save_pretrained(folder)                          # 4-bit tensors and the config
model = AutoModelForCausalLM.from_pretrained(folder)   # after fastops.integrations.transformers.register()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastops.int4 import Int4Weight, quantize_model
from fastops.int4.model import activations_of, quantizable
from fastops.nn import Int4Linear

METHOD = "fastops_int4"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@register_quantization_config(METHOD)
class FastopsInt4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How linear layers are quantised when a model is loaded, and how a saved one was.

    Args:
        group_size, symmetric, method: as in `fastops.int4.quantize` ("rtn" or "mse"; "gptq" needs calibration: use
            `fastops.int4.quantize_model` on a loaded model).
        activations, float_activations, bfloat16_activations, eight: as in `fastops.int4.quantize_model`.
        scale_dtype: "float16", "bfloat16" or "float32".
        modules_to_not_convert: parts of module names to leave alone; None: the output layer.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """

    def __init__(
        self,
        group_size: int = 128,
        symmetric: bool = True,
        method: str = "rtn",
        activations: str = "float",
        float_activations: tuple[str, ...] | list[str] = (),
        bfloat16_activations: tuple[str, ...] | list[str] = (),
        eight: tuple[str, ...] | list[str] = (),
        scale_dtype: str = "float16",
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        for name, value, allowed in (
            ("method", method, ("rtn", "mse")),
            ("activations", activations, ("float", "int8", "bfloat16")),
            ("scale_dtype", scale_dtype, tuple(_DTYPES)),
        ):
            if value not in allowed:
                raise ValueError(f"FastopsInt4Config: {name} is {value!r}, allowed: {', '.join(allowed)}")
        self.group_size, self.symmetric, self.method = group_size, symmetric, method
        self.activations, self.float_activations = activations, list(float_activations)
        self.bfloat16_activations = list(bfloat16_activations)
        self.eight, self.scale_dtype = list(eight), scale_dtype
        self.modules_to_not_convert = modules_to_not_convert

    def mode(self, name: str) -> str:
        """The activations of a layer."""
        floats, bfloat16s = tuple(self.float_activations), tuple(self.bfloat16_activations)
        return activations_of(name, self.activations, floats, bfloat16s)


@register_quantizer(METHOD)
class FastopsInt4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises after the weights are loaded; for a saved 4-bit model puts modules of the right shapes in before."""

    quantization_config: FastopsInt4Config

    def _skipped(self, model: Any) -> tuple[str, ...]:
        chosen = self.quantization_config.modules_to_not_convert
        skipped: list[str] = self.get_modules_to_not_convert(
            model, chosen, getattr(model, "_keep_in_fp32_modules", None)
        )
        return tuple(skipped)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            for name, linear in quantizable(model, self._skipped(model), config.group_size):
                parent, _, child = name.rpartition(".")
                owner = model.get_submodule(parent) if parent else model
                setattr(owner, child, _placeholder(name, linear, config))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            quantize_model(
                model, skip=self._skipped(model), eight=tuple(config.eight), activations=config.activations,
                float_activations=tuple(config.float_activations),
                bfloat16_activations=tuple(config.bfloat16_activations), group_size=config.group_size,
                symmetric=config.symmetric, method=config.method, scale_dtype=_DTYPES[config.scale_dtype],
            )  # fmt: skip
        if isinstance(model.get_output_embeddings(), Int4Linear):
            model.config.tie_word_embeddings = False  # the output layer has a weight of its own now
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _placeholder(name: str, linear: nn.Linear, config: FastopsInt4Config) -> Int4Linear:
    """An Int4Linear of the shapes `quantize` would have made, its tensors still to come."""
    n, k = linear.weight.shape
    planes = 2 if any(e in name for e in config.eight) else 1
    groups = planes * (1 if config.group_size == -1 else k // config.group_size)
    scales = torch.ones(n, groups, dtype=_DTYPES[config.scale_dtype])
    weight = Int4Weight(
        torch.zeros(n, planes * k // 2, dtype=torch.uint8), scales,
        zeros=torch.zeros_like(scales) if planes == 1 and not config.symmetric else None,
        planes=torch.arange(2, dtype=torch.int32) if planes == 2 else None,
    )  # fmt: skip
    bias = None if linear.bias is None else torch.zeros(n, dtype=linear.bias.dtype)
    return Int4Linear(weight, bias, config.mode(name))
