"""What goes into the campaign `inputs`: for each kind of input, the bytes that it begins with and what must come of a changed one."""

import io
import json
import math
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import Tiny, copy
from torture.boxed import Wrong, command
from torture.mutations import inside_png, inside_safetensors, inside_tar, inside_zip
from torture.subjects import resolved, same, whole_latents

from vavae_fast.commands.report import read_run
from vavae_fast.config import LightningDiTConfig, flatten, to_mapping, to_yaml
from vavae_fast.data import open_images
from vavae_fast.data.decode import MAX_PIXELS, decode
from vavae_fast.data.latents import read_statistics
from vavae_fast.errors import BadInput
from vavae_fast.evaluation import load_reference
from vavae_fast.models.weights import load_autoencoder, read_state_dict
from vavae_fast.parsing import parse_yaml, to_dataclass


@dataclass(frozen=True)
class Family:
    """A kind of input. check(path): whether the file at `path` was refused; `Wrong` when it was taken for what it is not."""

    name: str
    share: int  # of the inputs of a campaign of size 1
    seeds: Sequence[bytes]
    suffix: str
    check: Callable[[Path], bool]
    inside: Callable | None = None  # a mutation within, checksums made right


def require_equal(ours: object, theirs: object, what: str) -> None:
    if ours != theirs:
        raise Wrong(f"{what}: not what {what.split()[0]} reads from it")


# -- configs --------------------------------------------------------------------------------------------------------------


def config(path: Path) -> bool:
    """An accepted config reads back from its own YAML as the same."""
    values = resolved(path)
    text = to_yaml(to_dataclass(LightningDiTConfig, _unflattened(values)))
    again = flatten(to_mapping(to_dataclass(LightningDiTConfig, parse_yaml(text, "again"))))
    require_equal(values, again, "config round trip")
    return False


def _unflattened(values: dict) -> dict:
    whole: dict = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = whole
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return whole


# -- images ---------------------------------------------------------------------------------------------------------------


def image(path: Path) -> bool:
    """An accepted image is what Pillow alone gives, and not over the limit."""
    data = path.read_bytes()
    found = decode(data, str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
    if found.size[0] * found.size[1] > MAX_PIXELS or found.mode != "RGB":
        raise Wrong(f"{found.mode} of {found.size}")
    require_equal(found.tobytes(), theirs.tobytes(), "Pillow")
    return False


def pictures(seed: int) -> dict[str, list[bytes]]:
    """Small files of each kind: grey, palette, alpha, progressive, interlaced, CMYK, with metadata."""
    generator = np.random.default_rng(seed)
    rgb = Image.fromarray(generator.integers(0, 256, (24, 20, 3), np.uint8))
    smooth = Image.fromarray(np.linspace(0, 255, 40 * 32 * 3).reshape(40, 32, 3).astype(np.uint8))
    made: dict[str, list[bytes]] = {"PNG": [], "JPEG": []}
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, source, words in (
        ("PNG", rgb, {}), ("PNG", rgb.convert("L"), {}), ("PNG", rgb.convert("P"), {"transparency": 3}), ("PNG", smooth.convert("RGBA"), {}),
        ("PNG", rgb.convert("1"), {}), ("PNG", smooth, {"dpi": (72, 72), "icc_profile": b"x" * 200}), ("PNG", rgb.convert("LA"), {"optimize": True}),
        ("JPEG", rgb, {"quality": 90}), ("JPEG", smooth, {"progressive": True}), ("JPEG", rgb.convert("L"), {}), ("JPEG", smooth.convert("CMYK"), {}),
        ("JPEG", smooth, {"subsampling": 2, "exif": exif, "comment": b"hello"}), ("JPEG", rgb, {"restart_marker_blocks": 2}),
    ):  # fmt: skip
        file = io.BytesIO()
        source.save(file, kind, **words)
        made[kind].append(file.getvalue())
    return made


# -- tensors --------------------------------------------------------------------------------------------------------------


def safetensors_weights(path: Path) -> bool:
    """Accepted weights are what the safetensors library reads, prefixes of wrappers aside."""
    ours = read_state_dict(path)
    require_equal(same(ours), same({_bare(key): value for key, value in load_file(path).items()}), "safetensors")
    return False


def tokenizer_weights(path: Path) -> bool:
    """Whatever architecture the shapes say, it is built from them, or refused."""
    model = load_autoencoder(path)
    theirs = {_bare(key): value for key, value in load_file(path).items() if not key.startswith("linear_proj.")}  # of the training alone
    require_equal(same(dict(model.state_dict())), same(theirs), "safetensors")
    return False


def torch_weights(path: Path) -> bool:
    """Accepted weights are what torch.load reads."""
    ours = read_state_dict(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    theirs = content if any(isinstance(value, torch.Tensor) for value in content.values()) else None
    for key in ("model", "state_dict", "ema") if theirs is None else ():
        theirs = content[key] if theirs is None and isinstance(content.get(key), dict) else theirs
    require_equal(same(ours), same({_bare(key): value for key, value in theirs.items()}), "torch.load")
    return False


def _bare(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name


def statistics_file(path: Path) -> bool:
    mean, std = read_statistics(path, 4)
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    require_equal(same([mean, std]), same([theirs["mean"].float(), theirs["std"].float()]), "torch.load")
    if not (torch.isfinite(mean).all() and (std > 0).all()):
        raise Wrong("mean or std that cannot be")
    return False


def shards(path: Path) -> bool:
    """A folder of one shard; accepted rows are what the safetensors library reads, finite, of labels 0 or more."""
    shard = path.parent / "shard" / "latents_rank00_shard000.safetensors"
    shard.write_bytes(path.read_bytes())
    (latents, mirrored, labels, *_), _, _ = whole_latents(shard.parent)
    theirs = load_file(shard)
    values = [theirs[key].float() for key in ("latents", "latents_flip")]
    require_equal([latents, mirrored, labels], [*map(same, values), same(theirs["labels"].long())], "safetensors")
    if not all(torch.isfinite(value).all() for value in values) or int(theirs["labels"].min()) < 0:
        raise Wrong("values that must not be")
    return False


def array_archive(path: Path) -> bool:
    """An accepted reference or samples file is what NumPy reads, statistics finite, images uint8."""
    reference = load_reference(path, batch_size=3)
    with np.load(path, allow_pickle=False) as file:
        for name in ("mu", "sigma", "mu_s", "sigma_s"):
            if getattr(reference, name) is not None:
                require_equal(same(getattr(reference, name)), same(file[name]), "NumPy")
        if reference.images is not None:
            ours = torch.cat(list(reference.images)).permute(0, 2, 3, 1).contiguous()
            require_equal(same(ours.numpy()), same(np.ascontiguousarray(file["arr_0"])), "NumPy")
    return False


def array_files() -> list[bytes]:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (7, 5, 4, 3), np.uint8), np.arange(7)
    sigma = np.cov(generator.normal(size=(4, 9)))
    made = []
    for save, words in ((np.savez, dict(arr_0=images, arr_1=labels)), (np.savez_compressed, dict(arr_0=images)),
                        (np.savez, dict(mu=np.ones(4), sigma=sigma)),
                        (np.savez_compressed, dict(mu=np.ones(4, "f4"), sigma=sigma, mu_s=np.ones(4), sigma_s=sigma, arr_0=images))):  # fmt: skip
        file = io.BytesIO()
        save(file, **words)
        made.append(file.getvalue())
    return made


# -- images in archives and tables ------------------------------------------------------------------------------------------


def tar_images(path: Path) -> bool:
    """Accepted members are those that tarfile gives under their names."""

    def theirs(name: str) -> bytes | None:
        with tarfile.open(path, "r:") as archive:
            wanted = [m for m in archive.getmembers() if m.isreg() and _plain(m.name) == name]
            return archive.extractfile(wanted[0]).read() if len(wanted) == 1 else None

    return _archive(path, theirs, "tarfile")


def zip_images(path: Path) -> bool:
    def theirs(name: str) -> bytes | None:
        with zipfile.ZipFile(path) as archive:
            wanted = [info for info in archive.infolist() if _plain(info.orig_filename) == name]
            return archive.read(wanted[0]) if len(wanted) == 1 else None

    return _archive(path, theirs, "zipfile")


def _plain(name: str) -> str:
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _archive(path: Path, theirs: Callable[[str], bytes | None], who: str) -> bool:
    images = open_images(path, size=8, backend="pil", threads=2)
    for place, name in enumerate(images.names):
        if name.startswith("/") or ".." in name.split("/"):
            raise Wrong(f"took a member named {name!r}")
        require_equal(images._encoded(place)[1], theirs(name), f"{who} member {name!r}")
    _, faults = images.try_read(range(len(images)))
    return len(faults) == len(images)


def archives(files: dict[str, bytes]) -> tuple[bytes, bytes, bytes]:
    """A tar, a stored zip and a deflated one of the same files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    zips = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data, compression)
        zips.append(file.getvalue())
    return tar.getvalue(), *zips


def parquet_images(path: Path) -> bool:
    """Accepted rows are what pyarrow reads of the whole file."""
    import pyarrow
    import pyarrow.parquet

    images = open_images(path, size=8, backend="pil", threads=2)
    ours = []
    for place in range(len(images)):
        try:
            ours.append(images._encoded(place)[1])
        except BadInput:
            return True
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise Wrong("rows of a file that pyarrow itself cannot read whole") from None
    require_equal(ours, [row["image"]["bytes"] for row in table], "pyarrow")
    require_equal(images.labels.tolist(), [max(-1, row["label"]) for row in table], "pyarrow labels")
    return False


def parquet_files(files: dict[str, bytes]) -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    table = pyarrow.table({"image": rows, "label": [k % 3 for k in range(len(rows))]})
    made = []
    for words in ({}, {"compression": "none", "row_group_size": 2}, {"write_page_checksum": True}):
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, **words)
        made.append(file.getvalue())
    return made


def labels(path: Path) -> bool:
    """EDM2's dataset.json beside two images: accepted labels are the integers that the JSON holds for them."""
    folder = path.parent / "labelled"
    (folder / "dataset.json").write_bytes(path.read_bytes())
    images = open_images(folder, size=8, backend="pil", threads=1)
    held = json.loads(path.read_bytes())["labels"] or []
    theirs = {str(name): label for name, label in held}
    for name, label in zip(images.names, images.labels.tolist()):
        given = theirs.get(name, -1)
        if isinstance(given, bool) or not isinstance(given, int) or given != label or given < -1:
            raise Wrong(f"{name} has the label {given!r}, was read as {label}")
    return False


def run_folder(path: Path) -> bool:
    """metrics.jsonl of a run, as `report` reads it: every line that is an object with a finite step, the others counted."""
    run = path.parent / "run"
    (run / "metrics.jsonl").write_bytes(path.read_bytes())
    theirs, unreadable = {}, 0
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if type(values["step"]) not in (int, float) or not math.isfinite(values["step"]):
                raise ValueError
            theirs[values["step"]] = values
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            unreadable += 1
    found = read_run(run)
    require_equal((repr(found.steps), found.unreadable), (repr([theirs[step] for step in sorted(theirs)]), unreadable), "json lines")
    return command(["report", str(run)])


# -- all of them ----------------------------------------------------------------------------------------------------------


def families(tiny: Tiny, box: Path) -> list[Family]:
    """box: an empty folder in which the readers that want a folder have one."""
    drawn = pictures(0)
    small = {f"ant/{k}.png": data for k, data in enumerate(drawn["PNG"][:3])} | {f"bee/{k}.jpg": data for k, data in enumerate(drawn["JPEG"][:3])}
    tar, stored, deflated = archives(small | {"./wasp/1.png": drawn["PNG"][0], "notes.txt": b"hello"})
    shard = copy(tiny.latents, box / "shard")
    for other in [*sorted(shard.glob("*.safetensors"))[1:], shard / "manifest.json"]:
        other.unlink()
    for name in ("a.png", "b.png"):
        (box / "labelled").mkdir(exist_ok=True)
        (box / "labelled" / name).write_bytes(drawn["PNG"][0])
    (box / "run").mkdir()
    (box / "run" / "config.yaml").write_text("train: {max_steps: 4}\n")
    generator = np.random.default_rng(0)
    foreign = {"latents": generator.normal(size=(3, 4, 2, 2)).astype(np.float32), "labels": np.arange(3)}
    foreign["latents_flip"] = foreign["latents"][..., ::-1].copy()
    weights, tokenizer = ((tiny.root / name).read_bytes() for name in ("dit.safetensors", "vae.safetensors"))
    shard_file = next(iter(shard.glob("*.safetensors"))).read_bytes()
    edm2 = json.dumps({"labels": [["a.png", 6], ["b.png", 0]]}).encode()
    return [
        Family("YAML configs, bytes", 900, [(tiny.root / "dit.yaml").read_bytes(), *_configs()], ".yaml", config),
        Family("PNG", 1400, drawn["PNG"], ".png", image, inside_png),
        Family("JPEG", 1400, drawn["JPEG"], ".jpg", image),
        Family("safetensors, weights", 800, [weights, _small_safetensors()], ".safetensors", safetensors_weights, inside_safetensors),
        Family("safetensors, a tokenizer", 300, [tokenizer], ".safetensors", tokenizer_weights, inside_safetensors),
        Family("safetensors, latent shards", 700, [shard_file, safetensors.numpy.save(foreign)], ".bytes", shards, inside_safetensors),
        Family("npz", 900, array_files(), ".npz", array_archive, inside_zip),
        Family("pt, weights", 700, [_small_pt(True), _small_pt(False), (tiny.root / "vae.pt").read_bytes()], ".pt", torch_weights, inside_zip),
        Family("pt, statistics", 400, [(tiny.latents / "latents_stats.pt").read_bytes()], ".pt", statistics_file, inside_zip),
        Family("tar", 800, [tar], ".tar", tar_images, inside_tar),
        Family("zip", 800, [stored, deflated], ".zip", zip_images, inside_zip),
        Family("label files", 500, [edm2, b'{"labels": null}'], ".json", labels),
        Family("metrics.jsonl", 300, [(tiny.dit_run / "metrics.jsonl").read_bytes()], ".jsonl", run_folder),
    ]


def parquet_family() -> Family | None:
    """None where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return None
    drawn = pictures(0)
    files = parquet_files({str(k): data for k, data in enumerate([*drawn["PNG"][:4], *drawn["JPEG"][:3]])})
    return Family("parquet", 500, files, ".parquet", parquet_images)


def _configs() -> list[bytes]:
    folder = Path(__file__).parents[2] / "configs"
    return [path.read_bytes() for path in sorted(folder.glob("*.yaml")) if "tokenizer" not in path.name]


def _small_safetensors() -> bytes:
    return safetensors.numpy.save({"module.a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 0), np.float16), "c": np.ones((), np.int64)})


def _small_pt(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"ema": {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()}, "step": 3}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
