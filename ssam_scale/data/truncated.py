"""Files that change while they are read through a mapping: what is missing then reads as zeros, and is an error.

A read behind the end of a mapped file is SIGBUS, which ends the process without a word. Here the page that is missing
is replaced by one of zeros, so that the reader goes on to where it can ask for the file's size and raise.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ssam_scale.errors import UserError

_PAGE = mmap.PAGESIZE
_SA_SIGINFO, _MAP_FIXED = 4, 0x10
_ADDRESS_AT = 16  # of the fault, in a siginfo_t of 64 bits; its third int is the code


class _Action(ctypes.Structure):
    """glibc's `struct sigaction` on x86-64 and arm64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class MappedFile:
    """A file that is mapped, and known to be what it was.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = path.stat()
        self._bytes, self._written = found.st_size, found.st_mtime_ns
        if sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
            _Guard.installed().files.add(os.path.realpath(path))

    def check_unchanged(self) -> None:
        """Call it before an epoch, whose images are where the tables of the first one say.

        Raises:
            UserError: the file was written to, has become shorter, or another one has its name.
        """
        self.check()
        now = self._now()
        if (now.st_size, now.st_mtime_ns) != (self._bytes, self._written):
            raise UserError(
                f"{self.path}: has changed since the run began to read it ({now.st_size:,} bytes, {self._bytes:,} "
                "before); a run needs the same images to its end: write others under another name"
            )

    def _now(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error.strerror})") from error

    def check(self) -> None:
        """Call it when something was read, before that is used.

        Raises:
            UserError: the file has become shorter, or is gone from its disk.
        """
        now = self._now().st_size
        if now < self._bytes:
            raise UserError(
                f"{self.path}: has become shorter while it was read, {now:,} bytes of {self._bytes:,}; copy or write "
                "it again, under another name or when nobody reads it"
            )


class _Guard:
    """The process's handler of SIGBUS, of which there can be only one.

    The handler is Python's, which no handler of a signal should be that may come at any instruction. This one comes at
    a load from a mapped file and nowhere else, where no lock of the interpreter or of malloc is half taken.
    """

    _only: _Guard | None = None

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._handler = _Handler(self._handle)  # kept, because the process calls it
        self._before = _Action()
        action = _Action(handler=ctypes.cast(self._handler, ctypes.c_void_p), flags=_SA_SIGINFO)
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(self._before))

    @classmethod
    def installed(cls) -> _Guard:
        """The only one."""
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def _handle(self, number: int, info: int, context: int) -> None:
        code = ctypes.c_int.from_address(info + 8).value
        address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
        page = address - address % _PAGE
        if code > 0 and _mapped_at(address) in self.files:  # a fault, and none that somebody has sent
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            if self._libc.mmap(page, _PAGE, mmap.PROT_READ, flags, -1, 0) == page:
                return
        # Whatever it is, it is as if nobody had asked: with the handler that was there, the load faults once more.
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(self._before), None)
        if code <= 0:
            os.kill(os.getpid(), signal.SIGBUS)


def _mapped_at(address: int) -> str:
    """The file that is mapped at an address; empty if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.partition(" ")[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return line.split(maxsplit=5)[5] if line.count("/") else ""
    return ""
