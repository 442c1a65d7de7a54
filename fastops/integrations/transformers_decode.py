"""A decode loop without the module tree: `Decoder(model)` runs a transformers model's layers by direct operator calls.

transformers' own forward costs some milliseconds of Python for each token, which for a small model in few bits is more
than the arithmetic. Here a layer is about ten calls: joined projections, norms with the additions before them, rope
written straight into the cache, attention, the gated activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastops import _ops
from fastops.errors import NotSupportedError
from fastops.int4 import Int4Weight
from fastops.integrations.transformers_patch import _GELU as GELU
from fastops.integrations.transformers_patch import FAMILIES, _eps, _family, _offset, _window
from fastops.nn import Int4Linear
from fastops.ops.attention import attention
from fastops.ops.gated import gelu_and_mul, silu_and_mul
from fastops.ops.int4_linear import int4_linear
from fastops.ops.norm import fused_add_rms_norm, rms_norm
from fastops.ops.rope import qk_norm_rope

Map = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Norm:
    """An RMS norm's weight and options."""

    weight: Tensor
    eps: float
    offset: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight.detach(), _eps(module), _offset(module))

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, weight_offset=self.offset)  # type: ignore[no-any-return]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x; x = norm(residual), both in place."""
        return fused_add_rms_norm(x, residual, self.weight, self.eps, weight_offset=self.offset)[0]


@dataclass(slots=True)
class Layer:
    """What one decoder layer needs."""

    before: Norm
    after_attention: Norm | None  # Gemma: norms behind attention and MLP, too
    before_mlp: Norm
    after_mlp: Norm | None
    project: Map  # q, k and v, one behind the other
    heads: tuple[int, int, int]  # of q, of k; head size
    q_norm: Norm | None
    k_norm: Norm | None
    table: tuple[Tensor, Tensor]  # cos, sin [max_length, R / 2]
    scale: float
    window: int  # keys to the left, -1: all
    out: Map
    gate_up: Map
    activation: str | None  # of GELU; None: SiLU
    down: Map
    k_cache: Tensor  # [B, max_length, Hkv, D]
    v_cache: Tensor


def linear(modules: list[Any]) -> Map:
    """The results of several linear modules on one input, side by side in one call where that is possible."""
    if all(type(m) is Int4Linear for m in modules):
        joined = _joined([m.weight for m in modules]) if len({m.activations for m in modules}) == 1 else None
        if joined is not None:
            biases = [m.bias if m.bias is not None else torch.zeros(m.out_features) for m in modules]
            bias = torch.cat(biases).float() if any(m.bias is not None for m in modules) else None
            activations = modules[0].activations
            return lambda x: int4_linear(x, joined, bias, activations=activations)
    if len(modules) == 1:
        (m,) = modules
        if type(m) is nn.Linear:
            return lambda x: F.linear(x, m.weight, m.bias)
        return m  # type: ignore[no-any-return]
    parts = [linear([m]) for m in modules]
    return lambda x: torch.cat([f(x) for f in parts], -1)


def _joined(weights: list[Int4Weight]) -> Int4Weight | None:
    """Weights over the same inputs as one, or None where their forms differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    form = {(w.scales.shape[1], w.scales.dtype, *w.state_dict()) for w in weights}
    if len(form) > 1 or first.perm is not None or first.column_scales is not None:
        return None

    def rows(name: str) -> Tensor | None:
        return None if getattr(first, name) is None else torch.cat([getattr(w, name) for w in weights])

    codes, scales = rows("codes"), rows("scales")
    assert codes is not None
    assert scales is not None
    return Int4Weight(codes, scales, zeros=rows("zeros"), mins=rows("mins"), kept=rows("kept"), planes=first.planes)


class Decoder:
    """A causal language model with its own cache, for generation with few tokens at a time.

    Args:
        model: of the families `fastops.integrations.transformers.patch` knows, on the CPU, with plain or `Int4Linear`
            layers. Its weights are used as they are now; 4-bit ones are joined into copies.
        max_length: tokens of prompt and answer together; the cache is allocated for them.
        batch: sequences side by side. All have prompts of one length (no padding).

    Raises:
        NotSupportedError: another family or device, a rotary embedding that depends on the length; says which.
    """

    def __init__(self, model: Any, max_length: int = 2048, batch: int = 1) -> None:
        body: Any = getattr(model, "model", None)
        layers = getattr(body, "layers", None)
        family = _family(model)
        if layers is None or family not in FAMILIES or not hasattr(model, "lm_head"):
            raise NotSupportedError(
                f"Decoder: {type(model).__name__} is not a causal language model of {', '.join(FAMILIES)}"
            )
        if model.lm_head.weight.device.type != "cpu":
            raise NotSupportedError(f"Decoder: the model is on {model.lm_head.weight.device}, must be on cpu")
        if _ops.missing:
            raise NotSupportedError(f"Decoder: {_ops.missing}")
        config, rotary = model.config, body.rotary_emb
        kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
        for kind in kinds.values():
            if kind in ("dynamic", "longrope"):
                raise NotSupportedError(f"Decoder: rope type {kind!r} depends on the length of the text")
        self.max_length, self.batch, self.length = max_length, batch, 0
        self.embed = model.get_input_embeddings()
        self.head = linear([model.lm_head])
        self.softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.norm = Norm.of(body.norm)
        dtype = body.norm.weight.dtype
        with torch.no_grad():
            tables = {k: _table(rotary, k, max_length, dtype) for k in kinds}
            self.layers = [
                _layer(layer, tables.get(getattr(layer.self_attn, "layer_type", ""), tables[next(iter(tables))]),
                       (batch, max_length), dtype)
                for layer in layers[: config.num_hidden_layers]
            ]  # fmt: skip

    def reset(self) -> None:
        """Forgets the text."""
        self.length = 0

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Appends ids [B, S] to the text; the logits [B, V] behind the last of them.

        Raises:
            ValueError: a wrong shape, or a text that would grow beyond max_length.
        """
        if ids.dim() != 2 or ids.shape[0] != self.batch or ids.shape[1] == 0:
            raise ValueError(f"Decoder: ids has shape {list(ids.shape)}, must be [{self.batch}, S] with S >= 1")
        b, s = ids.shape
        end = self.length + s
        if end > self.max_length:
            raise ValueError(f"Decoder: the text would have {end} tokens, max_length is {self.max_length}")
        positions = torch.arange(self.length, end)
        slots = (positions + self.max_length * torch.arange(b)[:, None]).view(-1) if b > 1 else positions
        residual = self.embed(ids).flatten(0, 1)
        x = self.layers[0].before(residual)
        for i, layer in enumerate(self.layers):
            x = self._mix(layer, x, b, s, end, positions, slots)
            if layer.after_attention is not None:
                x = layer.after_attention(x)
            x = layer.before_mlp.add(x, residual)
            x = layer.gate_up(x)
            x = silu_and_mul(x) if layer.activation is None else gelu_and_mul(x, approximate=layer.activation)
            x = layer.down(x)
            if layer.after_mlp is not None:
                x = layer.after_mlp(x)
            if i + 1 < len(self.layers):
                x = self.layers[i + 1].before.add(x, residual)
        if s > 1:  # only the last token's logits
            x, residual = (t.view(b, s, -1)[:, -1].contiguous() for t in (x, residual))
        logits = self.head(self.norm.add(x, residual))
        self.length = end
        return logits if not self.softcap else torch.tanh(logits / self.softcap) * self.softcap

    def _mix(self, layer: Layer, x: Tensor, b: int, s: int, end: int, positions: Tensor, slots: Tensor) -> Tensor:
        hq, hk, d = layer.heads
        both = layer.project(x).view(b, s, hq + 2 * hk, d)
        q, k, v = both[:, :, :hq], both[:, :, hq : hq + hk], both[:, :, hq + hk :]
        qn, kn = layer.q_norm, layer.k_norm
        turned = torch.empty(b, s, hq, d, dtype=x.dtype)
        qk_norm_rope(
            q, k, None if qn is None else qn.weight, None if kn is None else kn.weight, *layer.table,
            eps=0.0 if qn is None else qn.eps, weight_offset=0.0 if qn is None else qn.offset, positions=positions,
            v=v, slots=slots, out=(turned, None), k_cache=layer.k_cache, v_cache=layer.v_cache,
        )  # fmt: skip
        mixed = attention(
            turned, layer.k_cache[:, :end], layer.v_cache[:, :end], causal=s > 1, scale=layer.scale,
            window=(layer.window, -1),
        )  # fmt: skip
        return layer.out(mixed.view(b * s, hq * d))

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        stop: tuple[int, ...] = (),
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The tokens [B, n] that follow ids [B, S], at most max_new_tokens; starts a new text.

        Args:
            stop: tokens that end a single sequence's text (they are returned, too).
            pick: maps logits [B, V] to tokens [B]; default: the largest (greedy).
        """
        self.reset()
        choose = pick or (lambda logits: logits.argmax(-1))
        new: list[Tensor] = []
        step = ids
        for _ in range(max_new_tokens):
            token = choose(self.step(step))
            new.append(token)
            step = token[:, None]
            if stop and self.batch == 1 and int(token) in stop:
                break
        return torch.stack(new, 1) if new else ids.new_empty(ids.shape[0], 0)


def _table(rotary: Any, kind: str, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each angle once."""
    places, like = torch.arange(length)[None], torch.empty(1, dtype=dtype)
    cos, sin = rotary(like, places, kind) if kind else rotary(like, places)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _layer(module: Any, table: tuple[Tensor, Tensor], room: tuple[int, int], dtype: torch.dtype) -> Layer:
    attention, mlp, config = module.self_attn, module.mlp, module.self_attn.config
    hq, hk, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    gemma = hasattr(module, "pre_feedforward_layernorm")
    act = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    window = _window(attention)
    split = hasattr(attention, "q_proj")
    return Layer(
        before=Norm.of(module.input_layernorm),
        after_attention=Norm.of(module.post_attention_layernorm) if gemma else None,
        before_mlp=Norm.of(module.pre_feedforward_layernorm if gemma else module.post_attention_layernorm),
        after_mlp=Norm.of(module.post_feedforward_layernorm) if gemma else None,
        project=linear([attention.q_proj, attention.k_proj, attention.v_proj] if split else [attention.qkv_proj]),
        heads=(hq, hk, d),
        q_norm=Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        table=table,
        scale=attention.scaling,
        window=window - 1 if window else -1,
        out=linear([attention.o_proj]),
        gate_up=linear([mlp.gate_proj, mlp.up_proj] if hasattr(mlp, "gate_proj") else [mlp.gate_up_proj]),
        activation=GELU.get(type(act).__name__),
        down=linear([mlp.down_proj]),
        k_cache=_ops.lasting(torch.empty(*room, hk, d, dtype=dtype)).zero_(),
        v_cache=_ops.lasting(torch.empty(*room, hk, d, dtype=dtype)).zero_(),
    )
