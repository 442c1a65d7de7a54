"""Importers against independent readings of the formats: the gguf package, and packers written from each description."""

import numpy as np
import pytest
import torch

from fastops import int4


def bits_to_int32(values):
    """Lists of 8 nibbles, lowest first -> int32, by Python integers."""
    out = []
    for eight in values:
        word = sum(int(v) << 4 * i for i, v in enumerate(eight))
        out.append(word - (1 << 32) if word >= 1 << 31 else word)
    return torch.tensor(out, dtype=torch.int32)


def pack_rows(codes):
    """[R, 8 c] -> int32 [R, c], lowest nibble first."""
    return torch.stack([bits_to_int32(row.view(-1, 8).tolist()) for row in codes])


N, K, G = 24, 64, 16
rng = torch.Generator().manual_seed(5)
CODES = torch.randint(0, 16, (N, K), generator=rng)
ZEROS = torch.randint(0, 16, (N, K // G), generator=rng)
SCALES = (torch.rand(N, K // G, generator=rng) + 0.1).half()


def grouped(t):
    return t.double().repeat_interleave(G, 1)


WANT = ((CODES.double() - grouped(ZEROS)) * grouped(SCALES)).float()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(version, act_order):
    g_idx = torch.arange(K) // G
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=rng)]
    stored = (ZEROS - 1) % 16 if version == 1 else ZEROS  # version 1 keeps zero - 1; 0 wraps to 15
    qweight, qzeros = pack_rows(CODES).T.contiguous(), pack_rows(stored.T)
    w = int4.from_gptq(qweight, qzeros, SCALES.T.contiguous(), g_idx.int(), version=version)
    want = (CODES.double() - ZEROS.double()[:, g_idx]) * SCALES.double()[:, g_idx]
    assert torch.equal(w.dequantize(), want.float())
    assert (w.perm is not None) == act_order
    assert w.group_size == G


def test_gptq_symmetric_words():
    """A symmetric version 1 file holds 0x77777777, version 2 0x88888888."""
    for version, word in ((1, 0x77777777), (2, 0x88888888 - (1 << 32))):
        qzeros = torch.full((K // G, N // 8), word, dtype=torch.int32)
        w = int4.from_gptq(pack_rows(CODES).T.contiguous(), qzeros, SCALES.T.contiguous(), version=version)
        assert w.zeros is None
        assert torch.equal(w.dequantize(), ((CODES - 8).double() * grouped(SCALES)).float())


def test_awq():
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output feature of nibble i

    def pack(t):  # [R, N] along N
        return torch.stack(
            [bits_to_int32([[row[8 * c + o] for o in order] for c in range(N // 8)]) for row in t.tolist()]
        )

    w = int4.from_awq(pack(CODES.T), pack(ZEROS.T), SCALES.T.contiguous())
    assert torch.equal(w.dequantize(), WANT)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_compressed_tensors(asymmetric):
    """A nibble is the signed code + 8, and so is a zero point's."""
    packed = pack_rows(CODES)
    zero_point = pack_rows(ZEROS.T).T.contiguous() if asymmetric else None
    w = int4.from_compressed_tensors(packed, SCALES, torch.tensor([N, K]), zero_point)
    signed = CODES.double() - 8
    zp = grouped(ZEROS) - 8 if asymmetric else 0.0
    assert torch.equal(w.dequantize(), ((signed - zp) * grouped(SCALES)).float())
    order = torch.randperm(K, generator=rng)
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[order] = (torch.arange(K) // G).int()
    w = int4.from_compressed_tensors(packed, SCALES, (N, K), zero_point, g_idx)
    scale = SCALES.double()[:, g_idx.long()]
    zp = ZEROS.double()[:, g_idx.long()] - 8 if asymmetric else 0.0
    assert torch.equal(w.dequantize(), ((signed - zp) * scale).float())


def test_hqq():
    """Rows of the grouped weight: the first half in the high nibbles, the second in the low ones."""
    rows = CODES.view(-1, G)
    half = rows.shape[0] // 2
    w_q = torch.tensor(
        [
            [int(a) * 16 + int(b) for a, b in zip(x, y, strict=True)]
            for x, y in zip(rows[:half], rows[half:], strict=True)
        ]
    )
    zero = (torch.rand(rows.shape[0], 1, generator=rng) * 15).half()  # not whole
    w = int4.from_hqq(w_q.to(torch.uint8), SCALES.view(-1, 1), zero, (N, K))
    want = (rows.float() - zero.float()) * SCALES.view(-1, 1).float()
    assert torch.equal(w.dequantize(), want.view(N, K))


@pytest.mark.parametrize(("kind", "size", "block"), [("Q4_0", 18, 32), ("Q4_K", 144, 256)])
def test_gguf_is_bit_for_bit_the_gguf_packages(kind, size, block):
    gguf = pytest.importorskip("gguf")
    n, k = 6, 3 * block
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (n, 3, size), dtype=np.uint8)
    for at in (0,) if kind == "Q4_0" else (0, 2):  # finite fp16 where the format has scales
        halves = random.normal(size=(n, 3)).astype(np.float16) / 64
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    raw[0, 0, :2] = 0  # a zero scale is allowed here
    raw = raw.reshape(n, -1)
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = int4.from_gguf(torch.from_numpy(raw), kind, (n, k)).dequantize().numpy()
    assert got.dtype == want.dtype
    assert np.array_equal(got, want)


I32 = torch.int32
ZW, QZ, SC = torch.zeros(8, 16, dtype=I32), torch.zeros(4, 2, dtype=I32), torch.ones(4, 16).half()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: int4.from_gptq(ZW.long(), QZ, SC), TypeError, "from_gptq: qweight is int64, must be int32"),
    (lambda: int4.from_gptq(ZW[0], QZ, SC), ValueError, "qweight has shape [16], must have 2"),
    (lambda: int4.from_gptq(ZW, QZ[:, :1], SC), ValueError, "qzeros has shape [4, 1], must be [4, 2]"),
    (lambda: int4.from_gptq(ZW, QZ, SC[:, :8]), ValueError, "scales has shape [4, 8], must be [4, 16]"),
    (lambda: int4.from_gptq(ZW, QZ[:3], SC[:3]), ValueError, "scales has 3 groups for K = 64"),
    (lambda: int4.from_gptq(ZW, QZ, SC.int()), TypeError, "scales is int32, must be float32, float16, bfloat16"),
    (lambda: int4.from_gptq(ZW, QZ, SC * 0), ValueError, "scales holds a zero"),
    (lambda: int4.from_gptq(ZW, QZ, SC * float("nan")), ValueError, "scales holds an infinity or a NaN"),
    (lambda: int4.from_gptq(ZW, QZ, SC, torch.full((64,), 4, dtype=I32)), ValueError, "g_idx runs from 4 to 4, groups from 0 to 3"),
    (lambda: int4.from_gptq(ZW, QZ, SC, torch.zeros(64, dtype=I32)), ValueError, "g_idx does not give every group 16"),
    (lambda: int4.from_gptq(ZW, QZ, SC, torch.zeros(63, dtype=I32)), ValueError, "g_idx has shape [63], must be [64]"),
    (lambda: int4.from_gptq(ZW, QZ, SC, version=3), ValueError, "version is 3, allowed: 1 (gptq), 2 (gptq_v2)"),
    (lambda: int4.from_awq(torch.zeros(64, 2, dtype=I32), QZ[:, :1], SC), ValueError, "from_awq: qzeros has shape [4, 1]"),
    (lambda: int4.from_compressed_tensors(ZW, SC, (16, 64)), ValueError, "weight_packed has shape [8, 16], must be [16, 8]"),
    (lambda: int4.from_compressed_tensors(ZW, SC, (1, 2, 3)), ValueError, "weight_shape is [1, 2, 3], must be (N, K)"),
    (lambda: int4.from_hqq(torch.zeros(4, 16).byte(), SC[:, :1], SC[:, :1], (2, 64)), ValueError, "scale has shape [4, 1], must be [8, 1]"),
    (lambda: int4.from_hqq(torch.zeros(4, 24).byte(), SC[:, :1], SC[:, :1], (2, 64)), ValueError, "group size is 24, must divide K = 64"),
    (lambda: int4.from_gguf(torch.zeros(2, 36).byte(), "Q5_0", (2, 64)), ValueError, "kind is 'Q5_0', allowed: Q4_0, Q4_K"),
    (lambda: int4.from_gguf(torch.zeros(2, 35).byte(), "Q4_0", (2, 64)), ValueError, "raw has shape [2, 35], must be [2, 36]"),
    (lambda: int4.from_gguf(torch.zeros(2, 144).byte(), "Q4_K", (2, 64)), ValueError, "K is 64, Q4_K needs a multiple of 256"),
])  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_random_tensors_never_crash():
    """Any shapes and dtypes: a weight or a clear error."""
    import random

    r = random.Random(0)
    dtypes = [torch.int32, torch.uint8, torch.float16, torch.float32, torch.int64]

    def tensor(good):
        if r.random() < 0.6:
            return good.clone()
        shape = [r.choice([0, 1, 2, 3, 4, 8, 16, 36, 64]) for _ in range(r.choice([1, 2, 2, 2, 3]))]
        return torch.randint(0, 100, shape).to(r.choice(dtypes))

    made, refusals = 0, []
    for _ in range(2000):
        which = r.randrange(5)
        try:
            if which == 0:
                int4.from_gptq(
                    tensor(ZW), tensor(QZ), tensor(SC), tensor(torch.arange(64) // 16), version=r.choice([1, 2])
                )
            elif which == 1:
                int4.from_awq(tensor(torch.zeros(64, 2, dtype=I32)), tensor(QZ), tensor(SC))
            elif which == 2:
                int4.from_compressed_tensors(
                    tensor(torch.zeros(16, 8, dtype=I32)),
                    tensor(SC.T),
                    (r.choice([16, 0, 8]), 64),
                    tensor(torch.zeros(2, 4, dtype=I32)),
                )
            elif which == 3:
                int4.from_hqq(
                    tensor(torch.zeros(4, 16).byte()),
                    tensor(torch.ones(8, 1)),
                    tensor(torch.ones(8, 1)),
                    (r.choice([2, 1, 0]), 64),
                )
            else:
                int4.from_gguf(
                    tensor(torch.zeros(2, 36).byte()),
                    r.choice(["Q4_0", "Q4_K"]),
                    (r.choice([2, 0]), r.choice([64, 256, 0])),
                )
            made += 1
        except (ValueError, TypeError) as error:
            refusals.append(str(error))
    assert made > 100
    assert [r for r in refusals if not r.startswith(("from_", "Int4Weight: "))] == []
