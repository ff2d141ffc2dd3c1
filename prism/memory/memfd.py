"""Memory files: anonymous, shared by passing their descriptors, and given back page by page.

Thin calls of the C library that Python's own modules lack. All raise `OSError` and release the GIL.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from prism.types import Address, Bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000  # Python 3.11 names none of them
_POPULATE_READ, _POPULATE_WRITE = 22, 23
_MAP_FAILED = ctypes.c_void_p(-1).value
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_NOWHERE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def create_memfd(name: str) -> int:
    """A new memory file of no size, closed on exec, that accepts seals."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def allocate(fd: int, offset: int, size: Bytes) -> None:
    """Take pages for a range now, growing the file if need be, so that touching them later cannot fail."""
    os.posix_fallocate(fd, offset, size)


def punch_hole(fd: int, offset: int, size: Bytes) -> None:
    """Give the pages of a range back to the system; the file keeps its size and reads as zeros there."""
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size) != 0:
        raise _error()


def allocated_bytes(fd: int) -> Bytes:
    """Memory that the file's pages take."""
    return Bytes(os.fstat(fd).st_blocks * 512)


def reserve_addresses(size: Bytes) -> Address:
    """Addresses that cannot be touched and take no memory."""
    return _mmap(None, size, _PROT_NONE, _NOWHERE, -1, 0)


def unreserve_addresses(address: Address, size: Bytes) -> None:
    """Give addresses back, together with what is mapped there."""
    if _libc.munmap(address, size) != 0:
        raise _error()


def map_file(address: Address, size: Bytes, fd: int, offset: int) -> None:
    """Put a range of the file at `address`, in place of whatever is there."""
    _mmap(address, size, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)


def unmap_file(address: Address, size: Bytes) -> None:
    """Take what is at `address` away; the addresses stay reserved."""
    _mmap(address, size, _PROT_NONE, _NOWHERE | _MAP_FIXED, -1, 0)


def touch(address: Address, size: Bytes, *, writable: bool) -> None:
    """Have all pages of a mapping looked up at once, instead of each one when it is first used.

    Where that fails, on Linux before 5.14 in any case, it is left to their first use.
    """
    _libc.madvise(address, size, _POPULATE_WRITE if writable else _POPULATE_READ)


def _mmap(address: Address | None, size: Bytes, protection: int, flags: int, fd: int, offset: int) -> Address:
    result = _libc.mmap(address, size, protection, flags, fd, offset)
    if result == _MAP_FAILED:
        raise _error()
    return Address(result)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
