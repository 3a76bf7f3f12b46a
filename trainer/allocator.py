"""The C library's allocator, told that a training run will want its memory again."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGEST_KEPT = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it would hand large activations back to the system and fault every page in anew at the next forward."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)
