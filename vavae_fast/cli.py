"""The command line: a table of commands, and what becomes of errors.

Exit status: 0 done; 2 bad input, one line on stderr; 1 a fault of ours, with traceback, or of another process, which it names;
17 a device that computes wrong, one line; 130 interrupted. Nothing here imports torch.
"""

import difflib
import errno
import os
import sys
import traceback

from vavae_fast import __version__
from vavae_fast.commands.invoke import run_command
from vavae_fast.errors import BadInput, HardwareFault, Interrupted, PeerFault, printable
from vavae_fast.launched import die_with_parent, world_size

COMMANDS = {
    "demo": "the whole pipeline on embedded digits, in minutes, CPU or GPU",
    "train-tokenizer": "images -> VA-VAE",
    "extract": "images -> latent shards",
    "train": "latent shards -> LightningDiT (also: torchrun train.py)",
    "sample": "LightningDiT -> images",
    "evaluate": "images -> FID, IS, precision, recall; or rFID, PSNR, SSIM, LPIPS of a tokenizer",
    "analyze": "latents -> uniformity (the paper's Table 6), pictures of their distribution",
    "gallery": "pictures of a LightningDiT: classes, trajectories, interpolation, nearest training latents",
    "sweep": "sampler settings in every combination -> scores, the best",
    "reproduce": "the paper's experiments at the scale of digits, CIFAR-10 or ImageNet",
    "export": "a run's checkpoint -> one .safetensors or .pt file, or a pipeline's folder",
    "report": "a run folder -> one HTML page",
    "compare": "several runs -> their curves on one HTML page",
    "bench-report": "benchmarks/results -> the README's tables and plots",
    "doctor": "what works on this machine, what is missing, how to get it",
}

# Of the user's file system, not of ours: one line, status 2.
_USER_ERRNO = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
               errno.ENAMETOOLONG, errno.EFBIG, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ESTALE}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        return _main(argv)
    except BadInput as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error))
    except HardwareFault as error:
        return _complain(str(error), 17)
    except PeerFault as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error), 1)
    except Interrupted:
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in _USER_ERRNO:
            raise
        return _complain(_file_system_line(error))
    except MemoryError:
        return _complain("out of memory; use a smaller batch (train.micro_batch_size, sample.per_proc_batch_size)")
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        return _complain(f"{str(error).split('. ')[0]}; use a smaller train.micro_batch_size, or model.use_checkpoint=true")


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"vavae-fast {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise BadInput(f"no command {argv[0]!r}{_nearest(argv[0])}; commands: {', '.join(COMMANDS)}")
    if world_size() > 1:
        die_with_parent()  # before anything takes time: a launcher may be killed while its workers start
    run_command(argv[0], argv[1:])
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"vavae-fast {__version__}: train and sample VA-VAE + LightningDiT (arXiv 2501.01423)\n\n"
        f"usage: vavae-fast COMMAND [--config FILE] [key.path=value ...] [flags]\n\n{lines}\n\n"
        "example:\n  vavae-fast train --config configs/lightningdit_xl_64ep.yaml data.data_path=latents --dry-run\n\n"
        "vavae-fast COMMAND --help shows a command's own flags."
    )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _complain(line: str, status: int = 2) -> int:
    rank = int(os.environ.get("RANK", 0))
    said = printable(" ".join(line.split()))
    print(f"error: {said}" if rank == 0 else f"error (rank {rank}): {said}", file=sys.stderr)
    return status


def _file_system_line(error: OSError) -> str:
    cures = {
        errno.ENOSPC: "make room, or choose another output folder",
        errno.EDQUOT: "the quota is used up; make room, or choose another output folder",
        errno.ENOENT: "check the path",
        errno.EIO: "the disk or its connection is failing; save what is there, and choose another path",
    }
    cure = cures.get(error.errno, "choose another path, or change its permissions")
    return f"{error.filename or 'file system'}: {error.strerror}; {cure}"


if __name__ == "__main__":
    sys.exit(main())
