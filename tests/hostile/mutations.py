"""Mutations: bytes, text, trees of plain values; each draws from the `random.Random` it is given and nothing else."""

from __future__ import annotations

import copy
import gzip
import io
import random as randomness
from collections.abc import Sequence
from typing import Any

#: What attackers write where text is expected. CANARY: a file that must never appear.
TEXTS = (
    "", " ", "\x00", "\x1b]0;title\x07", "\u202e", "\ud800", "\ufeff", "é" * 300, "A" * 5000, "'", '"', "\\", "%s%n",
    "../outside/secret", "../outside", "/etc/passwd", "..", ".", "/", "~", "~root/x", "file:///etc/passwd", "a\nb",
    "outside-link", "outside-link/secret", "*", "../**", "[" * 50, "(", "-", "--help", "nan", "inf", "-inf", "1e999",
    "0x10", "1_0", "٣", "1e-999", "true", "null", "~", "9" * 5000, "-9223372036854775809", "18446744073709551616",
    "__import__('os').system('touch CANARY')", "{{7*7}}", "${jndi:ldap://x}", "$(touch CANARY)", "`touch CANARY`",
    "'; DROP TABLE job; --", "<script>", "=cmd|' /C calc'!A0", "{0.__class__}", "%(x)s", "onnx:" + "0" * 64,
    "data:" + "0" * 64, "recipe:" + "f" * 64, "vnnlib:" + "0" * 64, "data:../../../../etc/passwd", "onnx:..",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, -(2**63), -(2**63) - 1, 2**64, 2**70, 10**30, 10**400, 0.1, 255, 256, 65536, 10**6, 10**9,
)  # fmt: skip
#: YAML only: tags that would run code, bombs of anchors, ambiguous documents.
YAML_LINES = (
    "!!python/object/apply:os.system ['touch CANARY']", "x: !!python/name:os.system", "- !!python/module:os",
    "x: !!python/object/new:subprocess.Popen [[touch, CANARY]]", "<<: *a", "x: &a [*a]", "&a a: *a", "---", "...",
    "%YAML 9.9", "%TAG ! tag:yaml.org,2002:", "? [a, b]\n: c", "? {a: b}\n: c", "x: !!set {a, b}",
    "x: !!binary aGFsbG8=",
    "x: !!timestamp 2001-12-14", "x: 2001-99-99", "x: !!omap [a: b]", "x: 0o777", "x: 1:30:00", "x: !!int '9e9'",
    "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c]",
    "x: !!float nan", "x: |\n  text", "\t- x", "x: !<tag:a> b", "x: !!null ''", "=: 1", "- =", "x: !!bool maybe",
    "x: !!str {a: b}", "x: !!map [1]", "x: !!seq {a: 1}", "!!pairs [a: b]", "x: 1985-01-01T99:99:99Z",
)  # fmt: skip

_INTERESTING = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


#: How many changes one input gets: what is changed much is refused at its first line.
_FEW = (1, 1, 1, 1, 2, 3, 6)


def octets(random: randomness.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Some of: flips, cuts, doublings, splices with another input, numbers of 1 to 8 bytes at their extremes."""
    found = bytearray(data)
    for _ in range(random.choice(_FEW)):
        if not found:
            return bytes(found)
        at = random.randrange(len(found))
        match random.randrange(9):
            case 0:
                found[at] ^= 1 << random.randrange(8)
            case 1:
                found[at] = random.randrange(256)
            case 2:
                del found[at : at + random.choice((1, 2, 4, 16, 256, 4096))]
            case 3:
                found[at:at] = found[at : at + random.choice((1, 4, 16, 64, 1024))] * random.choice((1, 2, 100))
            case 4:
                del found[at:]
            case 5 if others:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                found[at:] = other[start:]
            case 6:
                width = random.choice((1, 2, 4, 8))
                number = random.choice(_INTERESTING) % (1 << (8 * width))
                found[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
            case 7:
                found[at:at] = random.choice(TEXTS).encode("utf-8", "surrogatepass")
            case _:
                # A varint, as protobuf and Parquet's Thrift write numbers and lengths.
                found[at : at + 1] = random.choice((b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x80" * 12))
    return bytes(found)


def value(random: randomness.Random) -> Any:
    """A plain value that is rarely the right one."""
    match random.randrange(9):
        case 0:
            return random.choice(TEXTS)
        case 1 | 2:
            return random.choice(NUMBERS)
        case 3:
            return random.choice((None, True, False, [], {}, [[]], {"": {}}))
        case 4:
            deep: Any = random.choice(NUMBERS)
            for _ in range(random.choice((3, 20, 90, 120))):
                deep = [deep] if random.randrange(2) else {"a": deep}
            return deep
        case 5:
            return [value(random) for _ in range(random.randrange(4))]
        case 6:
            return {random.choice(TEXTS): value(random) for _ in range(random.randrange(4))}
        case 7:
            form = random.choice(("range", "linspace", "geomspace", "glob", "uniform", "choice", "recipe", "file"))
            return {form: [random.choice(NUMBERS) for _ in range(random.randrange(4))]}
        case _:
            return random.choice(TEXTS) * random.choice((1, 50))


def tree(random: randomness.Random, whole: Any) -> Any:
    """A copy of nested lists and mappings, in which some places hold something else, are gone, moved or doubled."""
    whole = copy.deepcopy(whole)
    for _ in range(random.choice(_FEW)):
        places = list(_places(whole))
        if not places:
            return value(random)
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1:
                holder[key] = value(random)
            case 2:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[random.choice(TEXTS)] = holder.pop(key)
            case 4:
                other, place = random.choice(places)
                if place in other if isinstance(other, dict) else place < len(other):
                    holder[key] = copy.deepcopy(other[place])
            case _:
                if isinstance(holder, list):
                    holder.extend(copy.deepcopy(holder[: random.choice((1, 100))]))
                else:
                    holder[
                        random.choice(("jobs", "params", "grid", "zip", "random", "rows", "limits", "method", "x"))
                    ] = value(random)
    return whole


def _places(whole: Any) -> Any:
    left = [whole]
    while left:
        holder = left.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, item in list(items):
            yield holder, key
            left.append(item)


def lines(random: randomness.Random, text: str, words: Sequence[str]) -> str:
    """Text whose lines, or words in them, are doubled, dropped, swapped or replaced."""
    found = text.splitlines(keepends=True) or [""]
    for _ in range(random.choice(_FEW)):
        at = random.randrange(len(found))
        match random.randrange(6):
            case 0:
                found.insert(at, random.choice(words) + "\n")
            case 1:
                found[at:at] = found[at : at + 3] * random.choice((1, 30))
            case 2 if len(found) > 1:
                del found[at]
            case 3:
                other = random.randrange(len(found))
                found[at], found[other] = found[other], found[at]
            case 4:
                parts = found[at].split(" ")
                parts[random.randrange(len(parts))] = random.choice(words)
                found[at] = " ".join(parts)
            case _:
                place = random.randrange(len(found[at]) + 1)
                found[at] = found[at][:place] + random.choice((*words, *TEXTS)) + found[at][place:]
    return "".join(found)


def packed(random: randomness.Random, data: bytes) -> bytes:
    """Now and then in gzip: whole, cut, damaged, doubled, or followed by zeros that unpack to 64 MiB."""
    match random.randrange(40):
        case 0:
            return gzip.compress(data, 1)
        case 1:
            whole = gzip.compress(data, 1)
            return whole[: random.randrange(len(whole) + 1)]
        case 2:
            return octets(random, gzip.compress(data, 1))
        case 3:
            return gzip.compress(data, 1) + random.choice((b"", gzip.compress(data, 1), b"\0" * 100, b"junk"))
        case 4:
            return gzip.compress(data, 1) + BOMB
    return data


def _bomb() -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream:
        for _ in range(64):
            stream.write(bytes(1 << 20))
    return buffer.getvalue()


#: Unpacks to 64 MiB of zeros.
BOMB = _bomb()
