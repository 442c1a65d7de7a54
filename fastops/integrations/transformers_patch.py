"""A transformers model on fastops: norms, gated MLPs, rotary embedding, attention and (optionally) 4-bit linears.

    from fastops.integrations.transformers import patch
    patched = patch(model)          # print(patched) lists what was replaced and what was not, and why
    patched.undo()                  # or: with patch(model): ...

Modules stay what they are (classes, parameters, names, state dict); their ``forward`` is replaced on the instance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

from torch import Tensor, nn

import fastops
from fastops.integrations.transformers import NAME, register

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
_GELU = {"GELUTanh": "tanh", "PytorchGELUTanh": "tanh", "GELUActivation": "none", "GELU": "none"}


# ---- the forwards --------------------------------------------------------------------------------------------------


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _offset(norm: Any) -> float:
    """Gemma's norms store their weight less one."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return fastops.rms_norm(hidden_states, self.weight, _eps(self), weight_offset=_offset(self))


def _add_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual)."""
    return fastops.add_rms_norm(x, residual, norm.weight, _eps(norm), weight_offset=_offset(norm))


def _gate(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    kind = _GELU.get(type(act).__name__)
    return fastops.swiglu(gate, up) if kind is None else fastops.geglu(gate, up, approximate=kind)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_gate(self.act_fn, self.gate_proj(x), self.up_proj(x)))


def _joined_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return self.down_proj(_gate(self.activation_fn, gate, up))


def _window(self: Any) -> int | None:
    window = self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
    return None if type(self).__name__.startswith("Llama") else window


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    if hasattr(self, "qkv_proj"):
        heads = self.config.num_attention_heads * self.head_dim
        others = self.num_key_value_heads * self.head_dim
        q, k, v = (t.view(shape) for t in self.qkv_proj(hidden_states).split((heads, others, others), -1))
    else:
        q, k, v = (f(hidden_states).view(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
    cos, sin = position_embeddings
    half = cos.shape[-1] // 2  # transformers has each angle twice
    cos, sin = (t[..., :half].expand(q.shape[0], -1, -1) for t in (cos, sin))
    if hasattr(self, "q_norm"):
        q, k = fastops.qk_norm_rope(
            q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, eps=_eps(self.q_norm),
            weight_offset=_offset(self.q_norm),
        )  # fmt: skip
    else:
        q, k = fastops.apply_rope(q, k, cos, sin)
    assert k is not None
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, self.layer_idx)
    eager = sys.modules[type(self).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    out, weights = attend(
        self, q.transpose(1, 2), keys, values, attention_mask,
        dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, sliding_window=_window(self),
        **kwargs,
    )  # fmt: skip
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _layer(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """norm, attention, (add, norm), MLP, add."""
    residual = hidden_states
    mixed, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
    normed, residual = _add_norm(mixed, residual, self.post_attention_layernorm)
    return residual + self.mlp(normed)


def _gemma_layer(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same with a norm behind attention and MLP, too."""
    mixed, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
    normed, residual = _add_norm(self.post_attention_layernorm(mixed), hidden_states, self.pre_feedforward_layernorm)
    return residual + self.post_feedforward_layernorm(self.mlp(normed))


# ---- what goes where -----------------------------------------------------------------------------------------------


def _family(module: nn.Module) -> str | None:
    """The family whose own modeling file this module's class is from."""
    parts = type(module).__module__.split(".")
    if parts[:2] != ["transformers", "models"] or len(parts) < 4 or parts[3] != f"modeling_{parts[2]}":
        return None
    return parts[2]


def _activation_known(act: Any) -> bool:
    return type(act).__name__ in _GELU or type(act).__name__ in ("SiLU", "SiLUActivation")


def _choose(module: nn.Module, parts: dict[str, bool]) -> tuple[Callable[..., Any] | None, str] | None:
    """(forward, what) for a module to patch, (None, why not) for one that looks like it, None for anything else."""
    name = type(module).__name__
    kind = next(
        (
            k
            for k in ("RMSNorm", "MLP", "Attention", "DecoderLayer")
            if name.endswith(k) and not name.startswith("Siglip")
        ),
        None,
    )
    if kind is None:
        return None
    family = _family(module)
    if family not in FAMILIES:
        return None, f"{name}: not of a known family ({', '.join(FAMILIES)})"
    if "forward" in module.__dict__:
        return None, f"{name}: its forward was replaced by somebody else"
    if kind == "RMSNorm":
        return (_norm, "rms_norm") if parts["norms"] else (None, f"{name}: norms=False")
    if kind == "MLP":
        if not parts["mlps"]:
            return None, f"{name}: mlps=False"
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if not _activation_known(act):
            return None, f"{name}: activation {type(act).__name__} is not SiLU or GELU"
        what = "geglu" if type(act).__name__ in _GELU else "swiglu"
        return (_joined_mlp if hasattr(module, "gate_up_proj") else _mlp), what
    if kind == "Attention":
        if not parts["rope"]:
            return None, f"{name}: rope=False"
        return _attention, "qk_norm_rope" if hasattr(module, "q_norm") else "apply_rope"
    if not parts["norms"]:
        return None, f"{name}: norms=False"
    if family == "phi3" and any(getattr(module, f"resid_{n}_dropout").p for n in ("attn", "mlp")):
        return None, f"{name}: residual dropout is not 0"
    if hasattr(module, "pre_feedforward_layernorm"):
        return _gemma_layer, "add_rms_norm"
    return _layer, "add_rms_norm"


class Patched:
    """What `patch` did. Prints as a summary; ``undo()`` restores the model; works as a context manager.

    Attributes:
        replaced: (module name, what runs there now). skipped: (module name, why not).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.replaced: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self._forwards: list[nn.Module] = []
        self._linears: list[tuple[nn.Module, str, nn.Module]] = []
        self._attention: str | None = None

    def undo(self) -> None:
        """Restores every forward, linear layer and the attention implementation; harmless when called again."""
        for module in self._forwards:
            module.__dict__.pop("forward", None)
        for owner, name, linear in self._linears:
            setattr(owner, name, linear)
        if self._attention is not None:
            self.model.set_attn_implementation(self._attention)  # type: ignore[operator]
        self._forwards, self._linears, self._attention = [], [], None

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        def grouped(pairs: list[tuple[str, str]]) -> list[str]:
            counts: dict[str, list[str]] = {}
            for name, what in pairs:
                counts.setdefault(what, []).append(name)
            return [
                f"  {len(names):4} x {what}  ({names[0]}{', ...' if len(names) > 1 else ''})"
                for what, names in counts.items()
            ]

        lines = [f"fastops in {type(self.model).__name__}:", *grouped(self.replaced)]
        if self.skipped:
            lines += ["left as they are:", *grouped(self.skipped)]
        return "\n".join(lines)


def patch(
    model: nn.Module,
    *,
    norms: bool = True,
    mlps: bool = True,
    rope: bool = True,
    attention: bool = True,
    int4: bool | dict[str, Any] = False,
) -> Patched:
    """Puts fastops under a transformers model of the Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) or Phi-3 family.

    Args:
        model: a loaded model on the CPU (elsewhere fastops has no kernels yet, so nothing is replaced).
        norms: RMS norms, and the addition before them, in one pass (`rms_norm`, `add_rms_norm`).
        mlps: the gated activation (`swiglu`, `geglu`).
        rope: the attention modules' head norms and rotary embedding (`qk_norm_rope`, `apply_rope`).
        attention: attn_implementation="fastops".
        int4: True, or options of `fastops.int4.quantize_model`: linear layers become `Int4Linear`. The original ones
            are kept for undo(), so memory grows by the 4-bit copy until the `Patched` is dropped.

    Returns:
        A `Patched`: what was replaced, what was not and why, and undo().

    Raises:
        ImportError: transformers is missing or older than 5.0.

    Numerics: in 16 bits the norms round once where Llama's modules round twice; otherwise differences of rounding only.
    Training works: every operator is differentiable (4-bit weights get no gradient).
    """
    register()
    done = Patched(model)
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cpu":
        done.skipped.append(("", f"the model is on {device}: fastops has kernels for the CPU only"))
        return done
    parts = {"norms": norms, "mlps": mlps, "rope": rope}
    for name, module in model.named_modules():
        found = _choose(module, parts)
        if found is None:
            continue
        forward, what = found
        if forward is None:
            done.skipped.append((name, what))
            continue
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        done._forwards.append(module)
        done.replaced.append((name, what))
    if attention:
        _attention_too(model, done)
    if int4:
        _linears_too(model, done, {} if int4 is True else dict(int4))
    return done


def _attention_too(model: nn.Module, done: Patched) -> None:
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        done.skipped.append(("", f"{type(model).__name__}: no choice of attention implementation"))
        return
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    done._attention = before
    done.replaced.append(("", "attention"))


def _linears_too(model: nn.Module, done: Patched, options: dict[str, Any]) -> None:
    from fastops.int4 import quantize_model

    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    made = set(quantize_model(model, **options))
    for name, linear in linears.items():
        if name not in made:
            done.skipped.append((name, "Linear: skipped, or the group size does not divide its inputs"))
            continue
        parent, _, child = name.rpartition(".")
        done._linears.append((model.get_submodule(parent) if parent else model, child, linear))
        done.replaced.append((name, "int4_linear"))
