"""Hugging Face transformers: ``attn_implementation="fastops"``.

    from fastops.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastops")

Two registrations under one name: the attention function, and the mask function. Without the second, transformers makes
no mask for an unknown name, and causality is silently lost. Docs: docs/integrations/transformers.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastops
from fastops import _ops

NAME = "fastops"
_TESTED = (5, 0)  # the oldest major, minor this adapter is written for


def register(name: str = NAME) -> str:
    """Makes ``attn_implementation=name`` known to transformers, and `FastopsInt4Config`'s method; safe to call again.

    Returns the name.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'fastops.integrations.transformers needs transformers: pip install "transformers>=5"'
        ) from error
    found = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if found < _TESTED:
        raise ImportError(f"fastops needs transformers 5.0 or newer, found {transformers.__version__}")
    transformers.AttentionInterface.register(name, attention_forward)
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register(name, attention_mask)
    import fastops.integrations.transformers_quantizer  # noqa: F401  (registers FastopsInt4Config's method)

    return name


def __getattr__(name: str) -> Any:
    if name == "FastopsInt4Config":
        register()
        from fastops.integrations.transformers_quantizer import FastopsInt4Config

        return FastopsInt4Config
    if name == "Decoder":
        from fastops.integrations.transformers_decode import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a step: None where `attention_forward`'s own causality and window say it all, else a bool tensor.

    None needs: a causal or sliding-window pattern and nothing else, no padding, and keys that end with the queries
    (the kernel aligns to the bottom right; a static cache's unfilled slots break that).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = (
        allow_is_causal_skip
        and isinstance(q_offset, int)
        and isinstance(kv_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and (mask_function in (None, causal_mask_function) or _is_sliding(mask_function))
    )
    if plain and (attention_mask is None or _no_padding(attention_mask, kv_length, kv_offset)):
        return None
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    # Materialised always: sdpa_mask's own skip means torch's top-left causality, which is not ours.
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip


def _no_padding(mask: Tensor, kv_length: int, kv_offset: int) -> bool:
    if mask.dim() != 2 or torch.compiler.is_compiling():
        return False
    seen = mask[:, kv_offset : kv_offset + kv_length]
    return seen.shape[1] == kv_length and bool((seen != 0).all())


def _is_sliding(mask_function: Any) -> bool:
    """Whether this is transformers' causal sliding window and nothing more (its pieces are closures without names of
    their own; a chunked mask, say, has other ones)."""
    from transformers.masking_utils import causal_mask_function

    cells = getattr(mask_function, "__closure__", None) or ()
    parts = [c.cell_contents for c in cells if isinstance(c.cell_contents, tuple)]
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask" or len(parts) != 1:
        return False
    names = sorted(getattr(f, "__qualname__", "") for f in parts[0])
    return (
        len(names) == 2
        and causal_mask_function in parts[0]
        and names[1] == "sliding_window_overlay.<locals>.inner_mask"
    )


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query [B, Hq, S, D], key and value [B, Hkv, Sk, D] -> [B, S, Hq, Dv].

    KV heads are not repeated and nothing is copied. Dropout, position biases, transformers' own paged cache and head
    sizes that are no multiple of 8 go to transformers' sdpa function.
    """
    if dropout or query.shape[-1] % 8 or value.shape[-1] % 8 or _unusual(kwargs):
        return _sdpa(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            softcap=softcap, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is not None:
        if attention_mask.shape[-1] > k.shape[1]:
            attention_mask = attention_mask[..., : k.shape[1]]
        out = fastops.attention(q, k, v, scale=scaling, softcap=softcap or 0.0, sinks=s_aux, attn_mask=attention_mask)
        return out, None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        out = fastops.attention(q, k, v, scale=scaling, softcap=softcap or 0.0, sinks=s_aux)
    elif sliding_window and sliding_window <= k.shape[1]:
        out = fastops.attention(
            q, k, v, causal=True, scale=scaling, window=(sliding_window - 1, 0), softcap=softcap or 0.0, sinks=s_aux
        )
    else:
        out = fastops.attention(q, k, v, causal=q.shape[1] > 1, scale=scaling, softcap=softcap or 0.0, sinks=s_aux)
    return out, None


def _unusual(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("position_bias") is not None or kwargs.get("cache") is not None


def _sdpa(
    module: torch.nn.Module, query: Tensor, *args: Any, softcap: Any = None, s_aux: Any = None, **kwargs: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap or s_aux is not None:
        raise fastops.NotSupportedError(
            "fastops attention: softcap and sinks cannot be combined with dropout, position_bias or a head size "
            f"({query.shape[-1]}) that is no multiple of 8; use attn_implementation='eager'"
        )
    return sdpa_attention_forward(module, query, *args, **kwargs)


def growing_cache(config: Any) -> Any:
    """A DynamicCache whose full-attention layers write into spare room instead of copying the past at every token.

    transformers' DynamicCache concatenates: a token at context n copies n keys and values per layer. This one doubles
    its buffers when full and hands out views, which fastops reads in place. Pass as ``past_key_values``.

    Args:
        config: the model's config (its layer types decide which layers slide).
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        room_k: Tensor | None = None
        room_v: Tensor | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None
            assert self.values is not None
            self.room_k, self.keys = _append(self.room_k, self.keys, key_states)
            self.room_v, self.values = _append(self.room_v, self.values, value_states)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer()
    return cache


def _append(room: Tensor | None, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`past` (a prefix of `room`, if nobody replaced it) with `new` behind it, along dimension -2."""
    n = past.shape[-2] if past.numel() else 0
    end = n + new.shape[-2]
    kept = room is not None and n > 0 and past.data_ptr() == room.data_ptr() and past.shape[0] == room.shape[0]
    if room is None or not kept or end > room.shape[-2] or (torch.is_grad_enabled() and new.requires_grad):
        capacity = max(2 * end, 256)
        room = _ops.lasting(new.new_empty((*new.shape[:-2], capacity, new.shape[-1])))
        if n:
            room[..., :n, :].copy_(past)
    room[..., n:end, :].copy_(new)
    return room, room[..., :end, :]


def patch(model: torch.nn.Module, **options: Any) -> Any:
    """Norms, gated MLPs, rotary embedding, attention and (optionally) 4-bit linears of `model` on fastops; reversible.

    See `fastops.integrations.transformers_patch.patch` for the options and the result.
    """
    from fastops.integrations.transformers_patch import patch as run

    return run(model, **options)
