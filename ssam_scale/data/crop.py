"""The compiled `crop.c`, which decodes no more of a JPEG than a crop shows.

Where there is no compiler, or no libjpeg-turbo with its header, JPEGs are decoded as a whole: the same pixels, in more
time.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from ssam_scale.native import c_library

SYMBOLS = ("ssam_scale_crop_new", "ssam_scale_crop_free", "ssam_scale_crop_decode")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None: it cannot be compiled here."""
    return c_library(Path(__file__).with_name("crop.c"), ("-ljpeg",), _create_a_decoder)


def _create_a_decoder(library: ctypes.CDLL) -> None:
    """libjpeg finds out then whether it is of its header's version.

    Raises:
        OSError: it is not.
    """
    library.ssam_scale_crop_new.restype = ctypes.c_void_p
    decoder = library.ssam_scale_crop_new()
    if not decoder:
        raise OSError("libjpeg is of another version than its header")
    library.ssam_scale_crop_free(ctypes.c_void_p(decoder))
