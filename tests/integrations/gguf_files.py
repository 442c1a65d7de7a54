"""GGUF files of the small models, by the gguf package's own writer and quantisers."""

import gguf
import numpy as np
import torch


def _q4_k(shape, random):
    """Random bytes with small scales: every pattern of codes, scales and mins is a valid Q4_K block."""
    raw = random.integers(0, 256, (shape[0], shape[1] // 256, 144), dtype=np.uint8)
    for at in (0, 2):
        halves = (random.random(raw.shape[:2]).astype(np.float16) + 0.5) / 2000
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(model, path, arch, kinds):
    """Quantises the linear layers that have a part of `kinds` in their names ({"down_proj": "Q4_0", ...}; the others
    stay F32), writes them to `path`, and gives the model the file's weights. llama.cpp interleaves the halves of each
    head's rows of q and k for its "llama" architecture."""
    writer = gguf.GGUFWriter(str(path), arch)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), model.config.num_hidden_layers
    )
    random = np.random.default_rng(0)
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear or "lm_head" in name:
            continue
        kind = next((k for part, k in kinds.items() if part in name), "F32")
        kind_id = gguf.GGMLQuantizationType[kind]
        rows = module.weight.detach().float().numpy()
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        count = heads.get(name.rsplit(".", 1)[-1]) if arch == "llama" else None
        if count:
            rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        rows = np.ascontiguousarray(rows)
        raw = _q4_k(rows.shape, random) if kind == "Q4_K" else gguf.quantize(rows, kind_id)
        back = gguf.dequantize(raw, kind_id)
        if count:
            back = back.reshape(count, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        module.weight.data = torch.from_numpy(back.copy())
        writer.add_tensor(names.get_name(name) + ".weight", raw, raw_dtype=kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
