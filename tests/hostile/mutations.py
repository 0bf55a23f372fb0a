"""Changes to files that parsers are tried with: bytes, opcodes of pickles, values in JSON."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import zipfile
from collections.abc import Callable
from typing import Any

import xxhash

Mutation = Callable[[random.Random, bytes], bytes]

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 10**8)


def some_bytes(chance: random.Random, data: bytes) -> bytes:
    """One change of a few bytes anywhere."""
    changed = bytearray(data)
    at = chance.randrange(len(changed) + 1)
    kind = chance.randrange(7)
    if kind == 0 and at < len(changed):
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == 1 and at < len(changed):
        changed[at] = chance.randrange(256)
    elif kind == 2:
        changed[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 100)))
    elif kind == 3:
        del changed[at : at + chance.choice((1, 2, 4, 8, 100))]
    elif kind == 4:
        length = chance.choice((1, 4, 8, 16, 200))
        changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 50))
    elif kind == 5:
        width = chance.choice((1, 2, 4, 8))
        number = chance.choice(_NUMBERS) & (1 << 8 * width) - 1
        changed[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))  # type: ignore[arg-type]
    else:
        del changed[at:]
    return bytes(changed)


def several_bytes(chance: random.Random, data: bytes) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        data = some_bytes(chance, data)
    return data


_PUT_IN = (
    *(b"N", b"]", b"}", b")", b"0", b"2", b"t", b"a", b"s", b"e", b"u", b"R", b"b", b"Q", b"(", b"1"),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"h\x00"),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"G\x7f\xf0" + b"\0" * 6, b"X\0\0\0\0"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nrange\n", b"ctorch\nSize\n"),
)


def opcodes(chance: random.Random, data: bytes) -> bytes:
    """A pickle with opcodes left out, repeated, exchanged or put in; or with other bytes."""
    if chance.random() < 0.3:
        return several_bytes(chance, data)
    places = [at for _, _, at in pickletools.genops(data) if at is not None]
    ends = [*places[1:], len(data)]
    number = chance.randrange(1, len(places))
    at, end = places[number], ends[number]
    other = chance.randrange(1, len(places))
    taken = data[places[other] : ends[other]]
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at] + data[end:]
    if kind == 1:
        return data[:at] + data[at:end] * chance.choice((2, 3, 1000)) + data[end:]
    if kind == 2:
        return data[:at] + taken + data[end:]
    if kind == 3:
        return data[:at] + taken + data[at:]
    if kind == 4:
        put = chance.choice(_PUT_IN)
        return data[:at] + put + data[at:]
    return data[:at] + taken * 3 + data[at:end] + data[end:]


def pickle_of_archive(chance: random.Random, data: bytes) -> bytes:
    """A torch archive whose pickle is another, with its checksum put right; or with other bytes."""
    if chance.random() < 0.3:
        return several_bytes(chance, data)
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target,
    ):
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, opcodes(chance, record) if name.endswith("data.pkl") else record)
    return out.getvalue()


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 10**8, 10**18, 10**30, -(10**18), 1.5, 1e300, "", "x", "../x", "\0",
    "\ud800" * 3, [], {}, [[]], {"a": 1}, [1] * 1000, {"": None}, "9" * 5000,
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key or index in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            found.append((value, key))
            found += _places(value[key])
    return found


def values(chance: random.Random, data: bytes) -> bytes:
    """JSON with a value replaced, left out, renamed or repeated; or with other bytes."""
    if chance.random() < 0.25:
        return several_bytes(chance, data)
    value = copy.deepcopy(json.loads(data))
    places = _places(value)
    container, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0:
        container[key] = copy.deepcopy(chance.choice(_VALUES))
    elif kind == 1:
        del container[key]
    elif kind == 2 and isinstance(container, dict):
        container[str(chance.choice((key * 2 if isinstance(key, str) else key, "", "x")))] = container[key]
    else:
        other, place = chance.choice(places)
        container[key] = copy.deepcopy(other[place])
    return json.dumps(value).encode()


def values_and_checksum(chance: random.Random, data: bytes) -> bytes:
    """A manifest with a value changed, and its checksum of itself put right; or with other bytes."""
    changed = values(chance, data)
    try:
        manifest = json.loads(changed)
        manifest["checksum"] = "0" * 32
        blank = json.dumps(manifest).encode()
    except (ValueError, TypeError):
        return changed
    return blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode(), 1)


def lines_of_values(chance: random.Random, data: bytes) -> bytes:
    """A file of lines of JSON with one of them changed."""
    lines = data.split(b"\n")
    number = chance.randrange(len(lines))
    if lines[number] and chance.random() < 0.7:
        lines[number] = values(chance, lines[number])
    else:
        lines[number] = several_bytes(chance, lines[number])
    return b"\n".join(lines)


def header_of_safetensors(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, whose length is put right; or with other bytes."""
    if chance.random() < 0.3:
        return several_bytes(chance, data)
    length = int.from_bytes(data[:8], "little")
    header = values(chance, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
