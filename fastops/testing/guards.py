"""Tensors between unreadable pages: one access outside kills the process, so that a test cannot miss it."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(t: Tensor, end: bool = True) -> Tensor:
    """A contiguous copy of `t` that ends (or begins) exactly at an unreadable page. For tests.

    Unmapped with its storage: a process may have some 65530 mappings, and each of these is three.
    """
    page = mmap.PAGESIZE
    nbytes = max(t.numel() * t.element_size(), 1)
    room = -(-nbytes // page) * page
    base = _libc.mmap(
        None, room + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError("mmap failed")
    for fence in (base, base + page + room):
        if _libc.mprotect(fence, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = base + page + (room - nbytes if end else 0)
    buffer = (ctypes.c_uint8 * nbytes).from_address(start)
    weakref.finalize(buffer, _libc.munmap, base, room + 2 * page).atexit = False
    if t.numel() == 0:
        return torch.empty_like(t)
    view = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel()).view(t.shape)
    view.copy_(t)
    return view
