"""Archives, images, configs, tensors, arrays and labels that reach outside, unfold to any size, or never end."""

import functools
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torture.arena import Arena
from torture.boxed import Wrong

from vavae_fast.data import open_images, open_latents
from vavae_fast.data.decode import decode
from vavae_fast.evaluation import load_reference
from vavae_fast.models.weights import read_state_dict
from vavae_fast.parsing import parse_yaml, read_yaml


def _png(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def _all(path: object) -> None:
    """Every image of a source, decoded."""
    images = open_images(path, size=8, backend="pil", threads=2)
    images.read(range(len(images)))


# -- archives -------------------------------------------------------------------------------------------------------------

_MEMBERS = {
    "a name with ../": dict(name="../it ran.png"), "an absolute name": dict(name="/tmp/it ran.png"),
    "a name with ..\\": dict(name="a\\..\\..\\x.png"),
    "a symbolic link": dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a hard link": dict(type=tarfile.LNKTYPE, linkname="../../x"),
    "a character device": dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a block device": dict(type=tarfile.BLKTYPE, devmajor=8),
    "a pipe": dict(type=tarfile.FIFOTYPE),
}  # fmt: skip


def _tar(member: dict, arena: Arena) -> None:
    with tarfile.open(arena.box / "evil.tar", "w") as archive:
        made = tarfile.TarInfo("a/1.png")
        for key, value in member.items():
            setattr(made, key, value)
        data = _png() if made.isreg() else b""
        made.size = len(data)
        archive.addfile(made, io.BytesIO(data))
    arena.refuses(lambda: _all(arena.box / "evil.tar"))
    config = ("--config", arena.tiny.root / "tokenizer.yaml", "--checkpoint", arena.tiny.tokenizer_run)
    arena.refused("extract", *config, "--images", arena.box / "evil.tar", "--out", "latents")


def _zip(name: str, attributes: int, arena: Arena) -> None:
    with zipfile.ZipFile(arena.box / "evil.zip", "w") as archive:
        made = zipfile.ZipInfo(name)
        made.filename = made.orig_filename = name  # which ZipInfo would make harmless
        made.external_attr = attributes << 16
        archive.writestr(made, _png())
    arena.refuses(lambda: _all(arena.box / "evil.zip"))


def _long_names(arena: Arena) -> None:
    """A GNU long name and a PAX header of gigabytes, by their own word."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        made = tarfile.TarInfo("long")
        made.type, made.size = kind, 7 << 30
        (arena.box / "evil.tar").write_bytes(made.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512))
        arena.refuses(lambda: _all(arena.box / "evil.tar"))


def _high_ratio(arena: Arena) -> None:
    """A member that unfolds from two megabytes to half a gigabyte, with its size in the directory, and with a lie there."""
    with zipfile.ZipFile(arena.box / "evil.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("a.png", "w") as member:
        for _ in range(512):
            member.write(bytes(1 << 20))
    arena.refuses(lambda: _all(arena.box / "evil.zip"))
    data = (arena.box / "evil.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory = archive.start_dir
    lied = data[:directory] + data[directory:].replace(struct.pack("<I", 1 << 29), struct.pack("<I", 1000))
    (arena.box / "lies.zip").write_bytes(lied)
    arena.refuses(lambda: _all(arena.box / "lies.zip"))


def _nested(arena: Arena) -> None:
    """An archive in an archive in an archive is no image, and is not opened."""
    data = _png()
    for depth in range(6):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for k in range(16):
                archive.writestr(f"{k}.zip" if depth else f"{k}.png", data)
        data = file.getvalue()
    (arena.box / "evil.zip").write_bytes(data)
    arena.refuses(lambda: _all(arena.box / "evil.zip"))


def _overlapping(arena: Arena) -> None:
    """Thousands of names for the same bytes."""
    with zipfile.ZipFile(arena.box / "evil.zip", "w") as archive:
        archive.writestr("0.png", _png())
        first = archive.filelist[0]
        for k in range(1, 3000):
            twin = zipfile.ZipInfo(f"{k}.png")
            twin.header_offset, twin.CRC, twin.file_size, twin.compress_size = 0, first.CRC, first.file_size, first.compress_size
            archive.filelist.append(twin)
    arena.refuses(lambda: _all(arena.box / "evil.zip"))


def _link_out_of_a_folder(arena: Arena) -> None:
    folder = arena.box / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(_png())
    (folder / "b.png").symlink_to(arena.outside / "secret.png")
    arena.refuses(lambda: _all(folder))
    (folder / "b.png").unlink()
    (folder / "c").symlink_to(arena.outside)
    arena.refuses(lambda: _all(folder))


ARCHIVES: dict[str, Callable[[Arena], None]] = {
    **{f"a tar with {name}": functools.partial(_tar, member) for name, member in _MEMBERS.items()},
    "a zip with a name with ../": functools.partial(_zip, "../it ran.png", 0),
    "a zip with an absolute name": functools.partial(_zip, "/it ran.png", 0),
    "a zip with a drive": functools.partial(_zip, "C:/x.png", 0), "a zip with a link": functools.partial(_zip, "a.png", 0o120777),
    "a zip with a device": functools.partial(_zip, "a.png", 0o020666), "a tar with names of gigabytes": _long_names,
    "a zip bomb of high ratio": _high_ratio, "a nested zip bomb": _nested, "a zip bomb of overlapping members": _overlapping,
    "a folder with links that leave it": _link_out_of_a_folder,
}  # fmt: skip


# -- images ---------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _huge_header(arena: Arena) -> None:
    """60,000 x 60,000 pixels in a hundred bytes, as PNG, JPEG, BMP, PPM, GIF, TIFF and WebP."""
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", zlib.compress(bytes(1000)))
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    frame = jpeg.getvalue().index(b"\xff\xc0") + 5
    huge = jpeg.getvalue()[:frame] + struct.pack(">HH", 60000, 60000) + jpeg.getvalue()[frame + 4 :]
    gif = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02D\x01\0;"
    bmp = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0) + bytes(46)
    for data in (png, huge, gif, bmp, b"P6 60000 60000 255\n" + bytes(99), b"P6 " + b"9" * 5000 + b" 1 255\n"):
        arena.refuses(lambda data=data: decode(data, "evil"))


def _text_bomb(arena: Arena) -> None:
    """Compressed text and colour profile of a gigabyte each, in a PNG of eight pixels."""
    bomb = zlib.compress(bytes(1 << 29), 1)
    png = _png()
    for kind, start in ((b"zTXt", b"x\0\0"), (b"iCCP", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
        evil = png[:33] + _chunk(kind, start + bomb) + png[33:]
        try:
            if decode(evil, "evil").size != (8, 8):
                raise Wrong("another size")
        except ValueError:
            continue


def _many_frames(arena: Arena) -> None:
    """A GIF of a million frames: it is refused at the second, not at the last."""
    file = io.BytesIO()
    Image.new("P", (1, 1)).save(file, "GIF")
    data = file.getvalue()
    frame = data[data.index(b",") : -1]
    arena.refuses(lambda: decode(data[:-1] + frame * 1_000_000 + b";", "evil"))


def _endless_directories(arena: Arena) -> None:
    """A TIFF whose next directory is itself."""
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "TIFF")
    data = bytearray(file.getvalue())
    at = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[at : at + 2])[0]
    data[at + 2 + 12 * count : at + 6 + 12 * count] = struct.pack("<I", at)
    try:
        if decode(bytes(data), "evil").size != (4, 4):
            raise Wrong("another size")
    except ValueError:
        return


IMAGES = {
    "images of 3.6 billion pixels in their headers": _huge_header, "a PNG with text of half a gigabyte": _text_bomb,
    "a GIF of a million frames": _many_frames, "a TIFF whose directories never end": _endless_directories,
}  # fmt: skip


# -- configs, tensors, arrays, labels ---------------------------------------------------------------------------------------


def _yaml(text: str, arena: Arena) -> None:
    (arena.box / "evil.yaml").write_text(text)
    arena.refused("train", "--config", arena.box / "evil.yaml", "data.data_path=" + str(arena.tiny.latents))
    arena.refuses(lambda: parse_yaml(text[:100_000], "evil"))


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))
_TAGS = ("!!python/object/apply:os.system", "!!python/name:os.system", "!!python/object/new:os.system", "!!python/module:antigravity",
         "!!python/tuple", "!<tag:yaml.org,2002:python/object/apply:os.system>")  # fmt: skip


def _two_megabytes(arena: Arena) -> None:
    (arena.box / "evil.yaml").write_text("".join(f"a{k}: 1\n" for k in range(200_000)))
    arena.refused("train", "--config", arena.box / "evil.yaml")


def _endless_config(arena: Arena) -> None:
    arena.refuses(lambda: read_yaml("/dev/zero"))
    arena.refuses(lambda: read_yaml("/dev/urandom"))


def _yaml_tags(arena: Arena) -> None:
    for tag in _TAGS:
        _yaml(f"train: {tag} [\"touch '{arena.marker}'\"]\n", arena)


def _safetensors(arena: Arena) -> None:
    """Headers of 2**60 bytes, of 99 MB of brackets, of numbers without end."""
    path = arena.box / "evil.safetensors"
    nested = b'{"a":' + b"[" * 1_000_000
    shapes = b'{"latents":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}'
    for data in (struct.pack("<Q", 1 << 60), struct.pack("<Q", (1 << 64) - 1) + b"{}", struct.pack("<Q", len(nested)) + nested,
                 struct.pack("<Q", len(shapes)) + shapes, struct.pack("<Q", 99_000_000) + b"{" + b" " * 98_999_999):  # fmt: skip
        path.write_bytes(data)
        arena.refuses(lambda: read_state_dict(path))
        arena.refuses(lambda: open_latents(arena.box))


def _names_that_lead_out(arena: Arena) -> None:
    """Names of tensors are names: `../../x` is no path."""
    save_file({"../../it ran": torch.ones(1), "/it ran": torch.ones(1)}, arena.box / "evil.safetensors")
    arena.refused("sample", *arena.tiny.dit(), "--checkpoint", arena.box / "evil.safetensors", "--out", "samples")


def _npz(arena: Arena) -> None:
    """Object arrays, shapes of exabytes, headers that are programs, members that unfold to gigabytes."""
    from torture.payloads_torch import Runs

    touch = np.array([Runs(open, str(arena.marker), "w")], dtype=object)
    np.savez(arena.box / "objects.npz", arr_0=touch, arr_1=touch)
    np.savez(arena.box / "moments.npz", mu=touch, sigma=touch)
    headers = {
        "exabytes": "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 10000, 10000, 3), }", "negative": "{'descr': '|u1', "
        "'fortran_order': False, 'shape': (-1, -8, 8, 3), }", "program": "{'descr': __import__('os').system('true')}", "deep": "(" * 9000,
        "arithmetic": "9**9**9**9",
    }  # fmt: skip
    for name, text in headers.items():
        packed = (text + "\n").encode()
        with zipfile.ZipFile(arena.box / f"{name}.npz", "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(packed)) + packed + bytes(100))
    side = 9000  # a covariance of 650 MB
    with zipfile.ZipFile(arena.box / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, shape in (("mu.npy", (side,)), ("sigma.npy", (side, side))):
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, dict(descr="<f8", fortran_order=False, shape=shape))
            with archive.open(member, "w") as file:
                file.write(head.getvalue())
                for _ in range(int(np.prod(shape)) // side):
                    file.write(bytes(8 * side))
    for path in sorted(arena.box.glob("*.npz")):
        arena.refuses(lambda path=path: load_reference(path))
        arena.refused("evaluate", "--samples", path, "--reference", path, "--metrics", "is")


def _labels(arena: Arena) -> None:
    """A label of 10**18 would ask for as many class names."""
    folder = arena.box / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(_png())
    for value in (10**18, 1 << 64, -5, 6.5, True, "3", None, [1], {"a": 1}):
        (folder / "dataset.json").write_text(json.dumps({"labels": [["a.png", value]]}))
        arena.refuses(lambda: open_images(folder, size=8, backend="pil"))
    (folder / "dataset.json").write_text('{"labels": [["a.png", 1e999]]}')
    arena.refuses(lambda: open_images(folder, size=8, backend="pil"))
    (folder / "dataset.json").write_text("[" * 200_000)
    arena.refuses(lambda: open_images(folder, size=8, backend="pil"))
    (folder / "dataset.json").unlink()
    (folder / "a.cls").write_text("9" * 30)
    arena.refuses(lambda: open_images(folder, size=8, backend="pil"))


def _shards_on_a_pattern(arena: Arena) -> None:
    arena.refuses(lambda: open_images(arena.box / "images-{0..999999999999}.tar", size=8, backend="pil"))


DATA = {
    "a YAML of aliases of aliases": functools.partial(_yaml, _LAUGHS), "a YAML of 5,000 brackets": functools.partial(_yaml, "a: " + "[" * 5000),
    "a YAML that merges itself": functools.partial(_yaml, "a: &a {<<: *a}\n"),
    "a YAML of two megabytes": _two_megabytes,
    "a YAML with a number of 5,000 digits": functools.partial(_yaml, f"train: {{max_steps: {'9' * 5000}}}\n"),
    "a config without end": _endless_config,
    "YAML tags of Python": _yaml_tags, "safetensors headers of 2**60 bytes, and deep ones": _safetensors,
    "tensors whose names lead out": _names_that_lead_out, "npz files of objects, exabytes and programs": _npz,
    "labels of a quintillion classes": _labels,
    "a pattern of a trillion shards": _shards_on_a_pattern,
}  # fmt: skip
