"""Reading pickles that differ from one read before in a few values: those values, and no more.

The ranks of a run save megabytes of metadata that are the same but for a few numbers. Such a pickle is
compared with a template token by token, which for the bytes they share is one ``memcmp``. Where both have
a literal of one kind (an integer, a float, a truth value, a text) its value is taken; any other difference
makes it another pickle, which is read in full and becomes a template itself. What is returned shares with
the template every container in which nothing differs, so that results about it can be kept by identity.

Safe by construction: a pickle is a program, and two programs that differ in the operands of literals alone
build the same objects from them. Which object holds which literal is not guessed: the template is loaded
once more with a marker in the place of each literal that differs, and a literal whose marker does not come
out as a member of a plain container (the argument of a function, the key of a dict) is never replaced.
"""

from __future__ import annotations

import collections
import re
import struct
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_tool.containers import pickles
from ckpt_tool.containers.pickle_records import LEAVES, check_spelled_out, members
from ckpt_tool.errors import UnreadableError

_MOST_TEMPLATES = 16
_MOST_TEMPLATE_BYTES = 64 << 20  # of their pickles; what they describe takes about ten times as much
_MOST_MARKINGS = 6  # of one template: each is about as dear as reading it
_MOST_LITERALS = 1 << 17
_RUN = 256  # tokens between two places from which a token is looked up

# What Python's pickler writes in protocol 2, which is torch.save's (pickletools of Python 3.11), by the
# length of the operand. The only literals that stand in several places of what it writes are texts.
_TOKEN = (
    rb"[(.NRQabe}\]sut)\x81\x85-\x89]"  # none
    rb"|[\x80KqhK]."
    rb"|M.."
    rb"|[Jrj]...."
    rb"|G.{8}"
    rb"|c[^\n]*\n[^\n]*\n"
    rb"|\x8a(?:\x00|" + b"|".join(rb"\x%02x.{%d}" % (n, n) for n in range(1, 10)) + rb")"
)
_TOKENS = re.compile(rb"(?:" + _TOKEN + rb"){1,%d}" % _RUN, re.DOTALL)
_ONE_TOKEN = re.compile(_TOKEN, re.DOTALL)
_TEXT = ord("X")


class _Literal(NamedTuple):
    """A literal of a pickle: what ``kind`` of value, the value, and where the next token begins."""

    kind: type
    value: Any
    end: int


def _literal(data: bytes, at: int) -> _Literal | None:
    """The literal at a place where a token begins; None where it is another token or cut off."""
    code = data[at] if at < len(data) else 0
    if code == 0x4B:  # K
        end = at + 2
        value: Any = int.from_bytes(data[at + 1 : end], "little")
    elif code == 0x4D:  # M
        end = at + 3
        value = int.from_bytes(data[at + 1 : end], "little")
    elif code == 0x4A:  # J
        end = at + 5
        value = int.from_bytes(data[at + 1 : end], "little", signed=True)
    elif code == 0x8A and at + 1 < len(data):
        end = at + 2 + data[at + 1]
        value = int.from_bytes(data[at + 2 : end], "little", signed=True)
    elif code in (0x88, 0x89):
        end = at + 1
        value = code == 0x88
    elif code == 0x47 and at + 9 <= len(data):  # G
        end = at + 9
        (value,) = struct.unpack_from(">d", data, at + 1)
    elif code == _TEXT:
        end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "little")
        try:
            value = data[at + 5 : end].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return None
    else:
        return None
    return _Literal(type(value), value, end) if end <= len(data) else None


class _Tokens:
    """Where the tokens of a pickle begin.

    Raises:
        ValueError: it has a token that protocol 2 does not have, or does not end after its STOP.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._runs: list[int] = []
        at = 0
        while at < len(data):
            self._runs.append(at)
            at = self._after(at, _TOKENS)
        if data[-1:] != b"." or at != len(data):
            raise ValueError("not one pickle")

    def _after(self, at: int, pattern: re.Pattern[bytes]) -> int:
        if self._data[at] == _TEXT:
            found = _literal(self._data, at)
            if found is None:
                raise ValueError(f"a text that is cut off at byte {at}")
            return found.end
        match = pattern.match(self._data, at)
        if match is None:
            raise ValueError(f"byte {self._data[at]} at {at}")
        return match.end()

    def holding(self, position: int) -> int:
        """The beginning of the token that the byte at ``position`` belongs to."""
        at = self._runs[bisect_right(self._runs, position) - 1]
        while (after := self._after(at, _ONE_TOKEN)) <= position:
            at = after
        return at


class _Slot:
    """The marker of a literal: its number among those of a template."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class _Copy(NamedTuple):
    """A container to be copied: ``original`` with members replaced, by key, with slots (their numbers) or
    with copies (their numbers, in the order in which they are made)."""

    original: Any
    slots: list[tuple[Any, int]]
    copies: list[tuple[Any, int]]


class _Template:
    """A pickle that was read in full, and the literals in which others were found to differ from it."""

    def __init__(
        self, data: bytes, value: Any, extra: Mapping[tuple[str, str], Any] | None, tokens: _Tokens
    ) -> None:
        self.data, self._value, self._extra, self._tokens = data, value, extra, tokens
        self._fixed: set[int] = set()  # literals that cannot be replaced
        self._markings = 0
        self._slots: list[int] = []  # where the literals begin
        self._kinds: list[type] = []
        self._between: list[bytes] = [data]  # what stands before, between and after them
        self._copies: list[_Copy] = []

    def value_of(self, data: bytes) -> tuple[Any] | None:
        """What ``data`` describes, in a tuple; None where it is no pickle like this one."""
        values = self._values(data)
        if values is None:
            differing = self._differing(data)
            if differing is None or not self._mark(sorted({*self._slots, *differing})):
                return None
            values = self._values(data)
        return None if values is None else (self._made(values),)

    def _values(self, data: bytes) -> list[Any] | None:
        """The values of all slots in another pickle; None where it differs elsewhere, too."""
        values = []
        at = 0
        for part, kind in zip(self._between, self._kinds, strict=False):
            if not data.startswith(part, at):
                return None
            found = _literal(data, at + len(part))
            if found is None or found.kind is not kind:
                return None
            values.append(found.value)
            at = found.end
        last = self._between[-1]
        return values if len(data) - at == len(last) and data.startswith(last, at) else None

    def _differing(self, data: bytes) -> list[int] | None:
        """The literals in which ``data`` differs; None where it differs in anything else."""
        found: list[int] = []
        ours = theirs = 0
        while True:
            same = _common_prefix(self.data, ours, data, theirs)
            if ours + same == len(self.data) and theirs + same == len(data):
                return found
            if ours + same >= len(self.data) or len(found) == _MOST_LITERALS:
                return None
            token = self._tokens.holding(ours + same)
            mine, other = _literal(self.data, token), _literal(data, theirs + token - ours)
            if token in self._fixed or mine is None or other is None or mine.kind is not other.kind:
                return None
            found.append(token)
            ours, theirs = mine.end, other.end

    def _mark(self, slots: list[int]) -> bool:
        """Find out which containers hold the literals that begin at ``slots``."""
        if self._markings == _MOST_MARKINGS or slots == self._slots:
            return False
        self._markings += 1
        ends = [found.end for at in slots if (found := _literal(self.data, at)) is not None]
        between = [self.data[a:b] for a, b in zip([0, *ends], [*slots, len(self.data)], strict=True)]
        marked = between[0] + b"".join(
            b"J" + struct.pack("<i", number) + b"Q" + part for number, part in enumerate(between[1:])
        )
        places = _Places()
        markers = [_Slot(number) for number in range(len(slots))]
        try:
            whole, ignored = pickles.loads_marked(marked, markers, self._extra)
            places.visit(whole, self._value)
        except (UnreadableError, _NotAlike):
            self._fixed |= set(slots) - set(self._slots)
            return False
        lost = set(range(len(slots))) - places.numbers - {marker.number for marker in ignored}
        if lost:
            self._fixed |= {slots[number] for number in lost}
            return False
        self._slots, self._between, self._copies = slots, between, places.copies
        self._kinds = [found.kind for at in slots if (found := _literal(self.data, at)) is not None]
        return True

    def _made(self, values: Sequence[Any]) -> Any:
        made: list[Any] = []
        for original, slots, copies in self._copies:
            copy = original.copy() if type(original) is not tuple else list(original)
            for key, number in slots:
                copy[key] = values[number]
            for key, number in copies:
                copy[key] = made[number]
            made.append(copy if type(original) is not tuple else tuple(copy))
        return made[-1] if made else self._value


class _NotAlike(Exception):
    """A literal stands where it cannot be replaced."""


class _Places:
    """The containers of a template that hold markers, from the innermost out: ``copies``, the last of
    which is the whole. ``numbers`` are the markers found."""

    def __init__(self) -> None:
        self._seen: dict[int, int | None] = {}  # objects of the marked load -> index in ``copies``
        self.copies: list[_Copy] = []
        self.numbers: set[int] = set()

    def visit(self, marked: Any, value: Any) -> int | None:
        """Go through a container; its index in ``copies`` where it holds a marker at any depth.

        Raises:
            _NotAlike: a marker is inside of something that cannot be copied with another value.
        """
        if id(marked) in self._seen:
            return self._seen[id(marked)]
        self._seen[id(marked)] = None
        slots: list[tuple[Any, int]] = []
        copies: list[tuple[Any, int]] = []
        for key, one, other in _members(marked, value):
            kind = type(one)
            if kind in LEAVES:
                continue
            if kind is _Slot:
                slots.append((key, one.number))
                self.numbers.add(one.number)
            elif kind in _CONTAINERS:
                index = self.visit(one, other)
                if index is not None:
                    copies.append((key, index))
            else:
                self._refuse_markers(one)
        if slots or copies:
            self._seen[id(marked)] = len(self.copies)
            self.copies.append(_Copy(value, slots, copies))
        return self._seen[id(marked)]

    def _refuse_markers(self, one: Any) -> None:
        """Markers in stand-ins, sets and the like stay what they are: such a literal is never replaced."""
        if id(one) in self._seen and self._seen[id(one)] is None:
            return
        if type(one) is _Slot or id(one) in self._seen:
            raise _NotAlike
        self._seen[id(one)] = None
        for member in members(one):
            if type(member) not in LEAVES:
                self._refuse_markers(member)


_CONTAINERS = frozenset({dict, list, tuple, collections.OrderedDict, collections.defaultdict})


def _members(marked: Any, value: Any) -> Any:
    """(key, member of one, member of the other) of two containers that have to be the same."""
    if type(marked) is not type(value) or len(marked) != len(value):
        raise _NotAlike  # a marker was the key of a dict, or a function saw one
    if isinstance(marked, dict):
        if marked.keys() != value.keys():
            raise _NotAlike
        return [(key, one, value[key]) for key, one in marked.items()]
    return zip(range(len(marked)), marked, value, strict=True)


def _common_prefix(one: bytes, ours: int, other: bytes, theirs: int) -> int:
    """How many bytes are the same from here on."""
    most = min(len(one) - ours, len(other) - theirs)
    same, step = 0, 64
    while same < most and step:
        part = one[ours + same : ours + min(same + step, most)]
        if other.startswith(part, theirs + same):
            same += len(part)
            step *= 4
        elif step > 1:
            most = same + len(part)
            step = max(1, len(part) // 2)
        else:
            break
    return same


class Alike:
    """Reads pickles that are mostly alike. ``extra`` as for ``pickles.loads``.

    What is returned may share containers with what was returned before: nobody may change any.
    """

    def __init__(self, extra: Mapping[tuple[str, str], Any] | None = None) -> None:
        self._extra = extra
        self._templates: list[_Template] = []  # the one that was used last comes first
        self._lock = threading.Lock()

    def loads(self, data: bytes, *, where: str) -> Any:
        """The object that a pickle describes, spelled out in full.

        Raises:
            UnsafePickleError, UnreadableError: as ``pickles.loads`` and ``check_spelled_out``.
        """
        with self._lock:
            for index, template in enumerate(self._templates):
                found = template.value_of(data)
                if found is not None:
                    self._templates.insert(0, self._templates.pop(index))
                    return found[0]
            value = pickles.loads(data, where=where, extra=self._extra)
            check_spelled_out(value, len(data), where)
            try:
                tokens = _Tokens(data)
            except ValueError:  # of another protocol
                return value
            self._templates.insert(0, _Template(data, value, self._extra, tokens))
            while len(self._templates) > 1 and (
                len(self._templates) > _MOST_TEMPLATES
                or sum(len(template.data) for template in self._templates) > _MOST_TEMPLATE_BYTES
            ):
                self._templates.pop()
            return value
