"""All stores. A new one is a module beside this one, and a line here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ckpt_tool.errors import UsageError
from ckpt_tool.storage import LocalLocation, Location
from ckpt_tool.stores.base import Store
from ckpt_tool.stores.local import LocalStore

# By the scheme of its URLs.
STORES: dict[str, Store] = {
    LocalLocation.scheme: LocalStore(),
}

# What a user passes: a path, a URL, or a location that was made of one.
Place = str | os.PathLike[str] | Location

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def register(scheme: str, store: Store) -> None:
    """Add a store that is not part of the package; ValueError where the scheme is known."""
    if scheme in STORES:
        raise ValueError(f"there is a store of the scheme {scheme} already")
    STORES[scheme] = store


def open_location(place: Place) -> Location:
    """Where a place is.

    Raises:
        UsageError: it is a URL of an unknown scheme, or no text at all.
    """
    if place == "":
        raise UsageError("An empty path names nothing. Pass . for the directory you are in.")
    if isinstance(place, os.PathLike):
        return LocalLocation(Path(place))
    if not isinstance(place, str):
        return place
    url = _URL.match(place)
    if url is None:
        return LocalLocation(Path(place))
    scheme = url[1].lower()
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in sorted(STORES))
        raise UsageError(
            f"{place} is a URL of a scheme that is not known: {scheme}. Known are {known}. For a local "
            "path with such a name, put ./ before it."
        )
    return STORES[scheme].location(place)


def open_destination(place: Place) -> Location:
    """The same, wherever the program runs."""
    location = open_location(place)
    return store_of(location).absolute(location)


def store_of(location: Location) -> Store:
    return STORES[location.scheme]


def local_path(place: Place, wanted_by: str) -> Path:
    """The local path of a place; UsageError where it has none, which ``wanted_by`` needs."""
    location = open_location(place)
    if not isinstance(location, LocalLocation):
        raise UsageError(
            f"{wanted_by} needs a local directory; {location} is none. Copy it to a disk first."
        )
    return location.path
