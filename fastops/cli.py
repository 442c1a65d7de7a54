"""The ``fastops`` command."""

from __future__ import annotations

import argparse
import sys

HELP = """usage: fastops COMMAND [options]

commands:
  demo      a language model writes text on this machine, before and after fastops
  bench     time the operators (or, as "bench model", a whole model) against rivals
  info      version, build, instruction sets, devices, providers
  explain   which implementation a call would take, and why not the others

fastops COMMAND --help says more.
"""


def explain(argv: list[str]) -> int:
    import torch

    import fastops

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    p = argparse.ArgumentParser(
        prog="fastops explain",
        description="Explains the choice for a call of attention or scaled_dot_product_attention.",
        epilog="example: fastops explain attention --q 1,1024,32,128 --k 1,1024,8,128 --dtype bf16 --causal",
    )
    p.add_argument("op", choices=["attention", "scaled_dot_product_attention"])
    p.add_argument("--q", default="1,1024,32,128", help="shape of q (default 1,1024,32,128)")
    p.add_argument("--k", help="shape of k (default: q's)")
    p.add_argument("--v", help="shape of v (default: k's)")
    p.add_argument("--dtype", choices=list(dtypes), default="fp32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--causal", action="store_true")
    args = p.parse_args(argv)

    def tensor(text: str) -> torch.Tensor:
        return torch.empty([int(x) for x in text.split(",")], dtype=dtypes[args.dtype], device=args.device)

    try:
        q, k = tensor(args.q), tensor(args.k or args.q)
        v = tensor(args.v or args.k or args.q)
        option = {"causal": args.causal} if args.op == "attention" else {"is_causal": args.causal}
        if args.op != "attention":
            option["enable_gqa"] = True
        print(fastops.explain(args.op, q, k, v, **option))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        print(f"fastops explain: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command == "demo":
        from fastops import demo

        return demo.main(rest)
    if command == "bench":
        if rest[:1] == ["model"]:
            from fastops.bench.model import main as model

            return model(rest[1:])
        from fastops.bench.run import main as bench

        return bench(rest)
    if command == "info":
        import fastops

        print(fastops.info())
        return 0
    if command == "explain":
        return explain(rest)
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    print(f"fastops: unknown command {command!r}\n\n{HELP}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
