"""Small random models of the families that patch() and Decoder know."""

import torch
import transformers

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
SLIDES = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, use_sliding_window=True, **SLIDES),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=24),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16, **SLIDES),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "phi3-partial": lambda: transformers.Phi3Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
}  # fmt: skip


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").to(dtype).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3.0)
        else:
            p.data.add_(torch.rand_like(p) * 0.3)
    return model


IDS = torch.randint(3, 128, (3, 21), generator=torch.Generator().manual_seed(0))
