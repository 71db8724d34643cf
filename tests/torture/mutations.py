"""Bytes made wrong: as rot, a cut transfer or an enemy would, anywhere in a file, or inside it with its checksums made right again."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

_MAGICS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"PK\x03\x04", b"PK\x05\x06", b"PAR1", b"GIF89a", b"RIFF0000WEBP", b"BM", b"II*\0", b"\x80\x02",
           b"\x93NUMPY\x01\x00", b"ustar\x0000", b"<html>", b"version https://git-lfs", b"{", b"\x1f\x8b", b"", b"\0" * 16)  # fmt: skip
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1, 1 << 60)


def flip(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        bit = draw.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def truncate(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: draw.randrange(len(data))]


def insert(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 2, 4, 7, 100))) + data[at:]


def remove(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 2, 4, 16, 100)) :]


def repeat(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin = draw.randrange(len(data))
    piece = data[begin : begin + draw.choice((1, 8, 64, 512))]
    return data[:begin] + piece * draw.choice((2, 3, 50)) + data[begin + len(piece) :]


def splice(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = draw.choice(others)
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def magic(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    chosen = draw.choice(_MAGICS)
    return chosen + data[len(chosen) if draw.random() < 0.5 else 0 :]


def number(draw: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A number of 1, 2, 4 or 8 bytes at a place, most often near the start, where headers are."""
    width, value = draw.choice((1, 2, 4, 8)), draw.choice(_NUMBERS)
    packed = (value & (1 << 8 * width) - 1).to_bytes(width, draw.choice(("little", "big")))
    at = draw.randrange(min(len(data), draw.choice((64, 1024, 1 << 30))))
    return data[:at] + packed + data[at + width :]


Mutation = Callable[[Random, bytes, Sequence[bytes]], bytes]
MUTATIONS: tuple[Mutation, ...] = (flip, flip, truncate, insert, remove, repeat, splice, magic, number, number)


def mutated(draw: Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """(how, bytes): one mutation, now and then two. others: files of the same kind, for splices."""
    names = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        change = draw.choice(MUTATIONS)
        names.append(change.__name__)
        data = change(draw, data, others) or b"\0"
    return "+".join(names), data


def single_flip(data: bytes, bit: int) -> bytes:
    """`data` with one bit turned."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def inside_zip(draw: Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """One member mutated, and the archive (.pt, .npz, .zip) written anew with the checksum that fits."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist() if not info.is_dir()]
    chosen = draw.randrange(len(members))
    buffer, how = io.BytesIO(), ""
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for place, (info, content) in enumerate(members):
            if place == chosen and content:
                how, content = mutated(draw, content, [content])
            archive.writestr(zipfile.ZipInfo(info.filename), content)
    return f"in {members[chosen][0].filename}: {how}", buffer.getvalue()


def inside_safetensors(draw: Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """One field of the header's JSON changed, its length made right; now and then the bytes with it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, how = header[name], draw.choice(("dtype", "shape", "axes", "offsets", "name", "empty", "metadata", "drop"))
    if how == "dtype":
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E5M2", "X", "", None, 4))
    elif how == "shape":
        entry["shape"] = draw.choice(([], [0], [-1], [1 << 62, 4], [True], [2.0], "4", [1] * 500, [10**9, 0, 3, 3], None))
    elif how == "axes":
        draw.shuffle(entry["shape"])
    elif how == "offsets":
        entry["data_offsets"] = [offset + draw.choice((-4, 0, 4, 1 << 40)) for offset in entry["data_offsets"]]
    elif how == "name":
        other = draw.choice((name + "x", "../" + name, "", "a\0b", name.replace("0", str(10**9)), "module." + name, "encoder.conv_in.weight"))
        header[other] = header.pop(name)
    elif how == "empty":
        entry |= {"shape": [10**9, 0, *entry["shape"][2:]], "data_offsets": [entry["data_offsets"][0]] * 2}
    elif how == "metadata":
        header["__metadata__"] = draw.choice(({}, {"a": 1}, [], None, *({"vavae_fast": text} for text in ("[]", "{}", '{"row_sums": 3}'))))
    else:
        del header[name]
    text = json.dumps(header).encode()
    return f"header's {how} of {name}", len(text).to_bytes(8, "little") + text + data[8 + length :]


def inside_tar(draw: Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """A field of one header changed, and the header's checksum made right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        offset = draw.choice([member.offset for member in archive.getmembers()])
    header = bytearray(data[offset : offset + 512])
    begin, width, kind = draw.choice(((0, 100, "name"), (100, 8, "mode"), (124, 12, "size"), (136, 12, "time"), (156, 1, "type"), (157, 100, "link"),
                                      (257, 8, "magic"), (345, 155, "prefix")))  # fmt: skip
    chosen = draw.choice((b"../out.png", b"/etc/out.png", b"\x80" + b"\xff" * 7, b"77777777777", b"2", b"1", b"3", b"6", b"L", b"x", b"S", b"\0" * 8,
                          draw.randbytes(8)))  # fmt: skip
    header[begin : begin + width] = chosen[:width].ljust(width, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return f"header's {kind} = {chosen!r}", data[:offset] + bytes(header) + data[offset + 512 :]


def inside_png(draw: Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """One chunk mutated, its length and checksum made right."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen = draw.randrange(len(chunks))
    kind, content = chunks[chosen]
    how, content = mutated(draw, content, [content]) if content else ("nothing", content)
    chunks[chosen] = kind, content
    if draw.random() < 0.2:
        chunks.insert(draw.randrange(len(chunks)), chunks[draw.randrange(len(chunks))])
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return f"in {kind!r}: {how}", data[:8] + b"".join(packed)


def generated(strategy: SearchStrategy, count: int, seed: int) -> list:
    """Up to `count` examples of a hypothesis strategy, no two alike, the same for the same seed."""
    found = {}

    @hypothesis.seed(seed)
    @settings(max_examples=3 * count, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(example) -> None:
        if len(found) < count:
            found.setdefault(repr(example), example)

    collect()
    return list(found.values())
