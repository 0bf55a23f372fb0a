"""How deep, and how large without sharing, is what a pickle builds: found out before anything is built.

A few hundred bytes of pickle describe tuples of tuples whose hash, comparison or text takes longer than
any run, because each level names the one below twice; nesting of a hundred thousand levels ends the
process when it is hashed. Here a pickle is carried out on sizes in place of objects: the stack holds for
every object its depth and the number of its members, their members included.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Engines nest about a dozen levels, and what users put into a checkpoint not many more.
DEEPEST = 100
# Members that a walk through an object without regard to sharing meets, for each byte of the pickle, and
# what any pickle may have.
MEMBERS_PER_BYTE, MEMBERS_OF_ANY = 16, 1 << 18


class EndlessError(ValueError):
    """An honest program may have saved it, but a walk through it would not end in useful time."""


class _Object:
    """An object on the stack. ``held``: it is a member of another, and gets no more members."""

    __slots__ = ("depth", "held", "size")

    def __init__(self, depth: int = 0, size: int = 1) -> None:
        self.depth, self.size, self.held = depth, size, False


# Everything without members: texts, numbers, classes, tensors' storages.
_ATOM = _Object()
_NAMES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}


def _codes(names: str) -> list[int]:
    return [_NAMES[name] for name in names.split()]


# Opcodes that push an atom, with the bytes of their argument (pickletools of Python 3.11).
_ATOMS = {
    **dict.fromkeys(_codes("NONE NEWTRUE NEWFALSE EMPTY_TUPLE"), 0),
    **dict.fromkeys(_codes("BININT1 EXT1"), 1),
    **dict.fromkeys(_codes("BININT2 EXT2"), 2),
    **dict.fromkeys(_codes("BININT EXT4"), 4),
    **dict.fromkeys(_codes("BINFLOAT"), 8),
}
# The same whose argument has a length of so many bytes before it, or is so many lines.
_COUNTED = {
    _NAMES[name]: width
    for width, names in {
        1: "LONG1 SHORT_BINSTRING SHORT_BINBYTES SHORT_BINUNICODE",
        4: "LONG4 BINSTRING BINBYTES BINUNICODE",
        8: "BINBYTES8 BINUNICODE8 BYTEARRAY8",
    }.items()
    for name in names.split()
}
_LINES = {**dict.fromkeys(_codes("INT LONG FLOAT STRING UNICODE PERSID"), 1), _NAMES["GLOBAL"]: 2}
_PUTS = {_NAMES["BINPUT"]: 1, _NAMES["LONG_BINPUT"]: 4}
_GETS = {_NAMES["BINGET"]: 1, _NAMES["LONG_BINGET"]: 4}
_SKIPPED = {_NAMES["PROTO"]: 1, _NAMES["FRAME"]: 8}
_STOP = _NAMES["STOP"]


def check_shape(data: bytes) -> None:
    """Refuse a pickle of objects that are too deep or too large to go through.

    Args:
        data: a pickle that ``pickle_scan.check_opcodes`` let pass.

    Raises:
        EndlessError: what it builds is deeper than ``DEEPEST``, holds itself, or has more members than
            honest pickles of its length.
        ValueError: it takes from its stack or memo what is not there.
    """
    most = MEMBERS_OF_ANY + MEMBERS_PER_BYTE * len(data)
    try:
        _Machine(data, most).run()
    except (IndexError, KeyError) as error:
        raise ValueError("it takes what it did not put there") from error


class _Machine:
    """A pickle's stack, marks and memo, with sizes in place of objects."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._left = data, most
        self._stack: list[_Object] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Object] = {}

    def run(self) -> None:
        data, stack, memo = self._data, self._stack, self._memo
        push, at = stack.append, 0
        while True:
            code = data[at]
            at += 1
            if code in _ATOMS:
                push(_ATOM)
                at += _ATOMS[code]
            elif code in _PUTS:
                width = _PUTS[code]
                memo[int.from_bytes(data[at : at + width], "little")] = stack[-1]
                at += width
            elif code in _GETS:
                width = _GETS[code]
                push(memo[int.from_bytes(data[at : at + width], "little")])
                at += width
            elif code in _COUNTED:
                width = _COUNTED[code]
                push(_ATOM)
                at += width + int.from_bytes(data[at : at + width], "little")
            elif code in _STEPS:
                _STEPS[code](self)
            elif code in _LINES:
                push(_ATOM)
                for _ in range(_LINES[code]):
                    at = data.index(b"\n", at) + 1
            elif code in _SKIPPED:
                at += _SKIPPED[code]
            elif code == _STOP:
                return
            else:
                at = self._spelled(code, at)

    def _spelled(self, code: int, at: int) -> int:
        """Memo indices in text, of protocol 0; everything else that is left is nothing a file needs."""
        end = self._data.index(b"\n", at)
        if code == _NAMES["PUT"]:
            self._memo[int(self._data[at:end])] = self._stack[-1]
        elif code == _NAMES["GET"]:
            self._stack.append(self._memo[int(self._data[at:end])])
        else:
            raise ValueError(f"opcode {code}, which no checkpoint has")
        return end + 1

    def _made(self, members: Sequence[_Object]) -> None:
        """Push an object of these members."""
        new = _Object()
        self._stack.append(new)
        self._add(new, members)

    def _add(self, target: _Object, members: Sequence[_Object]) -> None:
        if target.held or target is _ATOM:
            raise EndlessError("it is part of itself, or changed once it is part of another")
        depth, size = target.depth, 0
        for member in members:
            if member is target:
                raise EndlessError("it is part of itself")
            size += member.size
            if member.depth >= depth:
                depth = member.depth + 1
            if member is not _ATOM:
                member.held = True
        target.depth = depth
        target.size += size
        self._left -= size
        if depth > DEEPEST:
            raise EndlessError(f"it is nested more than {DEEPEST} deep")
        if self._left < 0:
            raise EndlessError("it names the same objects again and again")

    def _marked(self) -> list[_Object]:
        """What lies above the last mark, taken from the stack."""
        mark = self._marks.pop()
        members = self._stack[mark:]
        del self._stack[mark:]
        return members

    # ---- opcodes without an argument

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def empty(self) -> None:
        self._stack.append(_Object())

    def from_marked(self) -> None:
        self._made(self._marked())

    def add_marked(self) -> None:
        members = self._marked()
        self._add(self._stack[-1], members)

    def pop(self) -> None:
        # An unpickler takes the mark where one is on top; so does this.
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self) -> None:
        self._marked()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def atom_from_one(self) -> None:
        self._stack.pop()
        self._stack.append(_ATOM)

    def atom_from_two(self) -> None:
        self._stack.pop()
        self.atom_from_one()


def _from_top(count: int) -> Callable[[_Machine], None]:
    """Make an object of the last ``count`` on the stack."""

    def make(machine: _Machine) -> None:
        stack = machine._stack
        if len(stack) < count:
            raise IndexError(count)
        members = stack[-count:]
        del stack[-count:]
        machine._made(members)

    return make


def _to_below(count: int) -> Callable[[_Machine], None]:
    """Add the last ``count`` on the stack to the object below them."""

    def add(machine: _Machine) -> None:
        stack = machine._stack
        if len(stack) <= count:
            raise IndexError(count)
        members = stack[-count:]
        del stack[-count:]
        machine._add(stack[-1], members)

    return add


def _steps() -> Mapping[int, Callable[[_Machine], Any]]:
    by_name: dict[str, Callable[[_Machine], Any]] = {
        "MARK": _Machine.mark,
        "EMPTY_LIST EMPTY_DICT EMPTY_SET": _Machine.empty,
        "TUPLE LIST DICT FROZENSET OBJ": _Machine.from_marked,
        "APPENDS SETITEMS ADDITEMS": _Machine.add_marked,
        "APPEND BUILD": _to_below(1),
        "SETITEM": _to_below(2),
        "TUPLE1": _from_top(1),
        "TUPLE2 REDUCE NEWOBJ": _from_top(2),
        "TUPLE3 NEWOBJ_EX": _from_top(3),
        "POP": _Machine.pop,
        "POP_MARK": _Machine.pop_mark,
        "DUP": _Machine.duplicate,
        "MEMOIZE": _Machine.memoize,
        "BINPERSID": _Machine.atom_from_one,
        "STACK_GLOBAL": _Machine.atom_from_two,
    }
    return {code: step for names, step in by_name.items() for code in _codes(names)}


_STEPS = _steps()
