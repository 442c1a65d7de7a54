"""Weights looked up in a table of each output feature, with a sparse part for outliers (dense and sparse, SqueezeLLM,
Kim et al., arXiv:2306.07629).

weight = fastops.lut.quantize(linear.weight, bits=4, sparsity=0.0045)
y = fastops.lut_linear(x, weight)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastops._parts import TensorParts
from fastops.int4.weight import FLOATS, pack_pairs, unpack_pairs

RUN = 32  # input features whose codes lie in 16 packed bytes
PARTS = ("codes", "table", "row_starts", "columns", "values")
_SPARSE = PARTS[2:]


@dataclass(frozen=True, slots=True)
class Packed:
    """What the kernels read: codes [N, ceil(K / 32), 16], table fp32 [N, 16]; the rest by the operator's names.
    `arguments` is all of it, for the direct call."""

    codes: Tensor
    table: Tensor
    rest: dict[str, Tensor | None]
    arguments: tuple[Any, ...]


class LutWeight(TensorParts):
    """A weight [N, K] of 4-bit (or 3-bit) codes into a table per output feature, and a sparse part.

        w[n, k] = table[n, code[n, k]] + sum of values[i] over i in row n with columns[i] = k

    Args:
        codes: uint8 [N, K / 2], feature 2 j in the low nibble of byte j, 2 j + 1 in the high one; K a multiple of 8.
        table: [N, 8] or [N, 16], fp32, fp16 or bf16. With 8 entries every code is below 8.
        row_starts, columns, values: None, or the sparse part as compressed rows: int32 [N + 1] rising from 0 to count,
            int32 [count] from 0 to K - 1, and [count] in fp32, fp16 or bf16.

    Plain tensors behind attributes of the same names; `state_dict()`, `from_state_dict`, pickle, deepcopy and
    `.to(device)` work. 3-bit codes take 4 bits of memory here.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; names the tensor.
    """

    PARTS = PARTS

    def __init__(
        self, codes: Tensor, table: Tensor, row_starts: Tensor | None = None, columns: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.codes, self.table, self.row_starts, self.columns, self.values = codes, table, row_starts, columns, values
        self._packed: Packed | None = None
        _check(self)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in fp32 (fp64 for fp64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        w = self.table.to(wide).gather(1, unpack_pairs(self.codes).long())
        if self.values is not None:
            assert self.row_starts is not None
            assert self.columns is not None
            rows = torch.repeat_interleave(self.row_starts.diff().long())
            w = w.index_put((rows, self.columns.long()), self.values.to(wide), accumulate=True)
        return w.to(dtype)

    def packed(self) -> Packed:
        """The form the kernels read; made once."""
        if self._packed is None:
            n, k = self.shape
            codes = torch.cat((unpack_pairs(self.codes), self.codes.new_zeros((n, -k % RUN))), 1)
            codes = codes.view(n, codes.shape[1] // RUN, 2, 16)
            table = self.table.float()
            if table.shape[1] == 8:
                table = torch.cat((table, table), 1)
            rest = {part: getattr(self, part) for part in _SPARSE}
            if self.values is not None:
                rest["values"] = self.values.float()
            packed, table = (codes[:, :, 0] | codes[:, :, 1] << 4).contiguous(), table.contiguous()
            self._packed = Packed(packed, table, rest, (k, n, packed, table, *rest.values()))
        return self._packed

    def __repr__(self) -> str:
        n, k = self.shape
        share = 0.0 if self.values is None else self.values.shape[0] / max(n * k, 1)
        return f"LutWeight([{n}, {k}], {self.table.shape[1]} entries, {share:.2%} sparse)"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _check(w: LutWeight) -> None:
    given = [name for name in _SPARSE if getattr(w, name) is not None]
    if given and len(given) < 3:
        raise ValueError(f"LutWeight: row_starts, columns and values go together, got {', '.join(given)}")
    for name in ("codes", "table", *given):
        t = getattr(w, name)
        if not isinstance(t, Tensor):
            raise TypeError(f"LutWeight: {name} must be a tensor, got {type(t).__name__}")
        if t.device != w.codes.device:
            raise TypeError(f"LutWeight: {name} is on {t.device}, codes on {w.codes.device}; they must agree")
        dims, allowed = {
            "codes": (2, (torch.uint8,)), "row_starts": (1, (torch.int32,)), "columns": (1, (torch.int32,)),
        }.get(name, (2 if name == "table" else 1, FLOATS))  # fmt: skip
        if t.dim() != dims:
            raise ValueError(f"LutWeight: {name} has shape {list(t.shape)}, must have {dims} dimension(s)")
        if t.dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"LutWeight: {name} is {_dtype(t)}, must be {names}")
    n, k = w.shape
    if k == 0 or k % 8:
        raise ValueError(f"LutWeight: codes has shape {list(w.codes.shape)}, so K is {k}; must be a multiple of 8")
    if w.table.shape[0] != n or w.table.shape[1] not in (8, 16):
        raise ValueError(f"LutWeight: table has shape {list(w.table.shape)}, must be [{n}, 8] or [{n}, 16]")
    if w.codes.device.type == "meta":
        return
    if not bool(torch.isfinite(w.table).all()):
        raise ValueError("LutWeight: table holds an infinity or a NaN")
    if w.table.shape[1] == 8 and bool((w.codes & 0x88).any()):
        raise ValueError("LutWeight: codes go beyond a table of 8 entries")
    if w.values is None:
        return
    assert w.row_starts is not None
    assert w.columns is not None
    count = w.values.shape[0]
    if w.row_starts.shape[0] != n + 1 or w.columns.shape[0] != count:
        raise ValueError(
            f"LutWeight: row_starts has {w.row_starts.shape[0]} entries and columns {w.columns.shape[0]}, must have "
            f"N + 1 = {n + 1} and, as values, {count}"
        )
    if int(w.row_starts[0]) != 0 or int(w.row_starts[-1]) != count or bool((w.row_starts.diff() < 0).any()):
        raise ValueError(f"LutWeight: row_starts must rise from 0 to the {count} values")
    if count and not bool(((w.columns >= 0) & (w.columns < k)).all()):
        raise ValueError(f"LutWeight: columns holds a number outside 0 to {k - 1}")
    if not bool(torch.isfinite(w.values).all()):
        raise ValueError("LutWeight: values holds an infinity or a NaN")


def quantize(
    w: Tensor, bits: int = 4, sparsity: float = 0.0, sensitivity: Tensor | None = None, iterations: int = 200
) -> LutWeight:
    """The table of each output feature by weighted k-means, outliers kept exactly.

    Args:
        w: [N, K], floating point; K a multiple of 8.
        bits: 3 or 4: 8 or 16 entries.
        sparsity: share of the weights kept in fp32 as sparse rows, those of largest size (section 4.2; the paper keeps
            0.0005 to 0.0045).
        sensitivity: [N, K], how much an error of each weight counts, the squared gradient of the loss say (equation 3);
            None: all alike.
        iterations: of Lloyd's algorithm, from quantiles of the row.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Example:
        >>> import torch, fastops
        >>> fastops.lut.quantize(torch.randn(16, 64), sparsity=0.01)
        LutWeight([16, 64], 16 entries, 0.98% sparse)
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"quantize: w must be a floating-point tensor, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2 or w.shape[1] == 0 or w.shape[1] % 8:
        raise ValueError(f"quantize: w has shape {list(w.shape)}, must be [N, K] with K a multiple of 8")
    if bits not in (3, 4):
        raise ValueError(f"quantize: bits is {bits}, allowed: 3, 4")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"quantize: sparsity is {sparsity}, must be from 0 to below 1")
    if sensitivity is not None and (sensitivity.shape != w.shape or bool((sensitivity < 0).any())):
        raise ValueError(f"quantize: sensitivity must be like w, {list(w.shape)}, and not negative")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("quantize: w holds an infinity or a NaN")
    w = w.detach().float()
    n, k = w.shape
    importance = torch.ones_like(w) if sensitivity is None else sensitivity.float() + 1e-12
    count = int(sparsity * n * k)
    outlier = torch.zeros(n * k, dtype=torch.bool, device=w.device)
    outlier[w.abs().flatten().topk(count).indices] = True
    outlier = outlier.view(n, k)
    importance = importance.masked_fill(outlier, 0.0)
    codes, table = torch.empty_like(w, dtype=torch.uint8), w.new_empty((n, 2**bits))
    for at in range(0, n, 256):  # rows at a time: the sums of a step stay small
        part = slice(at, at + 256)
        codes[part], table[part] = _kmeans(w[part], importance[part], 2**bits, iterations)
    if not count:
        return LutWeight(pack_pairs(codes), table)
    rest = (w - table.gather(1, codes.long()))[outlier]  # row by row
    starts = torch.cat((outlier.new_zeros(1, dtype=torch.int64), outlier.sum(1).cumsum(0))).int()
    return LutWeight(pack_pairs(codes), table, starts, outlier.nonzero()[:, 1].int(), rest)


def _kmeans(w: Tensor, importance: Tensor, entries: int, iterations: int) -> tuple[Tensor, Tensor]:
    """(codes [N, K], table [N, entries]) of small weighted squared error, each row for itself.

    In a sorted row clusters are runs, and their means differences of prefix sums: a step costs log K an entry.
    """
    ordered, order = w.sort(1)
    weight = importance.gather(1, order).double()
    zero = weight.new_zeros((w.shape[0], 1))
    mass = torch.cat((zero, weight.cumsum(1)), 1)
    moment = torch.cat((zero, (weight * ordered).cumsum(1)), 1)
    share = (torch.arange(entries, device=w.device) + 0.5) / entries
    low, high = (_quantile(ordered, mass, torch.full_like(share[:1], q)) for q in (0.002, 0.998))
    best = table = _quantile(ordered, mass, share)
    gain = torch.full_like(mass[:, 0], -torch.inf)
    # From places of equal mass, of equal distance, and half way between: which one ends best depends on the row.
    for start in (table, low + (high - low) * share, (table + low + (high - low) * share) / 2):
        table = start
        ends = torch.zeros((w.shape[0], entries + 1), dtype=torch.int64, device=w.device)
        ends[:, -1] = w.shape[1]
        for _ in range(iterations):
            last = ends.clone()
            ends[:, 1:-1] = torch.searchsorted(ordered, _midpoints(table))
            if torch.equal(ends, last):
                break
            total, sum_ = (prefix.gather(1, ends).diff() for prefix in (mass, moment))
            table = torch.where(total > 0, (sum_ / total).float(), table).sort(1).values
        total, sum_ = (prefix.gather(1, ends).diff() for prefix in (mass, moment))
        mine = torch.where(total > 0, sum_.square() / total, 0.0).sum(1)  # what the entries take off sum w^2
        best = torch.where((mine > gain)[:, None], table, best)
        gain = torch.maximum(mine, gain)
    return torch.searchsorted(_midpoints(best), w.contiguous()).to(torch.uint8), best


def _quantile(ordered: Tensor, mass: Tensor, share: Tensor) -> Tensor:
    """Of each sorted row the numbers below which `share` of its mass lies."""
    at = torch.searchsorted(mass, (mass[:, -1:] * share).contiguous()).clamp_(1, ordered.shape[1]) - 1
    return ordered.gather(1, at)


def _midpoints(table: Tensor) -> Tensor:
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()


def from_squeezellm(
    qweight: Tensor, lookup_table: Tensor, rows: Tensor | None = None, cols: Tensor | None = None,
    vals: Tensor | None = None, full_rows: Tensor | None = None, full_row_indices: Tensor | None = None,
) -> LutWeight:  # fmt: skip
    """A layer of a SqueezeLLM checkpoint, by the names of its tensors.

    Args:
        qweight: int32 [K / 32 bits, N], packed along K: 8 codes a word, or 32 codes of 3 bits in three.
        lookup_table: [N, 2^bits]; bits is 3 or 4.
        rows, cols, vals: None, or the sparse part as compressed rows (int32 [N + 1], int32 [count], fp32 [count]).
        full_rows, full_row_indices: None, or output features that have a dense part as well: fp32 [K, X], int32 [X].

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    for name, t in (("qweight", qweight), ("lookup_table", lookup_table)):
        if not isinstance(t, Tensor) or t.dim() != 2:
            raise ValueError(f"from_squeezellm: {name} must be a tensor of 2 dimensions")
    if qweight.dtype != torch.int32:
        raise TypeError(f"from_squeezellm: qweight is {_dtype(qweight)}, must be int32")
    n, entries = qweight.shape[1], lookup_table.shape[1]
    if entries not in (8, 16) or lookup_table.shape[0] != n:
        raise ValueError(f"from_squeezellm: lookup_table has shape {list(lookup_table.shape)}, must be [{n}, 8 or 16]")
    bits = 3 if entries == 8 else 4
    if qweight.shape[0] % bits:
        raise ValueError(f"from_squeezellm: qweight has {qweight.shape[0]} rows, must be a multiple of {bits}")
    words = qweight.long().T.reshape(n, -1, bits) & 0xFFFFFFFF  # 32 codes each
    if bits == 4:
        codes = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    else:  # 96 bits in a row
        a, b, c = words.unbind(-1)
        parts = [a >> 3 * i & 7 for i in range(10)] + [a >> 30 | (b & 1) << 2]
        parts += [b >> 3 * i + 1 & 7 for i in range(10)] + [b >> 31 | (c & 3) << 1]
        parts += [c >> 3 * i + 2 & 7 for i in range(10)]
        codes = torch.stack(parts, -1)
    codes = pack_pairs(codes.reshape(n, -1))
    if full_rows is None:
        return LutWeight(codes, lookup_table, rows, cols, vals)
    k = 2 * codes.shape[1]
    if full_row_indices is None or list(full_rows.shape) != [k, full_row_indices.numel()]:
        raise ValueError(f"from_squeezellm: full_rows has shape {list(full_rows.shape)}, must be [{k}, indices]")
    indices = full_row_indices.long()
    if bool(((indices < 0) | (indices >= n)).any()):
        raise ValueError(f"from_squeezellm: full_row_indices holds a number outside 0 to {n - 1}")
    at_rows, at_columns = [indices.repeat_interleave(k)], [torch.arange(k, device=indices.device).repeat(len(indices))]
    values = [full_rows.T.flatten().float()]
    if vals is not None:
        assert rows is not None
        assert cols is not None
        at_rows.append(torch.repeat_interleave(rows.diff().long()))
        at_columns.append(cols.long())
        values.append(vals.float())
    row, order = torch.cat(at_rows).sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(n + 1, device=row.device))
    return LutWeight(codes, lookup_table, starts.int(), torch.cat(at_columns)[order].int(), torch.cat(values)[order])
