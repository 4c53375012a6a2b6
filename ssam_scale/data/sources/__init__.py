"""Where images to be written come from; one file each."""

from ssam_scale.data.sources.base import Pixels, Sample, Source, Stored, evenly, listing, printable, state_of
from ssam_scale.data.sources.folder import ClassOrder, class_names, scan_folder
from ssam_scale.data.sources.opening import open_source

__all__ = [
    "ClassOrder",
    "Pixels",
    "Sample",
    "Source",
    "Stored",
    "class_names",
    "evenly",
    "listing",
    "open_source",
    "printable",
    "scan_folder",
    "state_of",
]
