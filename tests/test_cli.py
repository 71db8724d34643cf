"""The command line: quick answers without torch, exit statuses, one line an error, configs that read back, dry runs that write nothing."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from reference_keys import LIGHTNINGDIT, TOKENIZER

import vavae_fast
from vavae_fast import cli
from vavae_fast.cli import COMMANDS, main
from vavae_fast.errors import BadInput

CONFIGS = Path(__file__).parents[1] / "configs"
CPU_SECONDS = 0.5  # user + system, of a new interpreter: an answer that feels instant


def fresh(code_or_argv, cwd):
    """Run main(argv), or code, in a new interpreter: (result, CPU seconds, names of imported modules that took long to import)."""
    code = f"from vavae_fast.cli import main\nstatus = main({code_or_argv!r})" if isinstance(code_or_argv, list) else code_or_argv
    program = f"import sys\nstatus = 0\n{code}\nopen('modules', 'w').write(' '.join(sys.modules))\nsys.exit(status)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, seconds, set((cwd / "modules").read_text().split())


@pytest.fixture
def xl(tmp_path):
    path = tmp_path / "xl.yaml"
    path.write_text(LIGHTNINGDIT)
    return path


# -- quick, and without torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_answers_at_once(tmp_path, name):
    result, seconds, modules = fresh([name, "--help"] if name else ["--help"], tmp_path)
    assert result.returncode == 0 and "example:" in result.stdout and result.stderr == ""
    assert f"vavae-fast {name}" in result.stdout
    assert "torch" not in modules and seconds < CPU_SECONDS


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train", "--config", "none.yaml"], ["none.yaml", "no such config file"]),
        (["train", "--config", "xl.yaml", "model.use_qnorm=true"], ["model.use_qnorm", "model.use_qknorm"]),
        (["train", "--config", "xl.yaml", "train.max_steps=many"], ["train.max_steps", "whole number"]),
        (["train", "--config", "xl.yaml"], ["data.data_path", "path/to/latents"]),
        (["sample", "--config", "xl.yaml", "sample.cfg_channels=0"], ["sample.cfg_channels"]),
        (["extract", "--config", "xl.yaml", "--out", "latents"], ["data.path: not set"]),
        (["train-tokenizer", "--config", "xl.yaml"], ["xl.yaml", "needs a tokenizer config"]),
        (["evaluate"], ["--samples: missing"]),
        (["export", "--run", "nowhere", "--out", "a.pt"], ["nowhere: no such run folder"]),
        (["trian"], ["no command 'trian'", "did you mean train?"]),
    ],
)
def test_config_errors_answer_at_once(tmp_path, xl, argv, words):
    result, seconds, modules = fresh(argv, tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert "torch" not in modules and seconds < CPU_SECONDS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules", "xl.yaml"]


def test_importing_the_package_touches_neither_torch_nor_the_network(tmp_path):
    _, seconds, modules = fresh("import vavae_fast, vavae_fast.cli, vavae_fast.config", tmp_path)
    assert not modules & {"torch", "numpy", "PIL", "safetensors", "urllib.request", "http.client", "requests"}
    assert seconds < CPU_SECONDS


def test_importing_every_room_opens_no_connection_and_asks_no_device(tmp_path):
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("a connection at import")
socket.socket.connect = refuse
import torch
torch.cuda.is_available = refuse
torch.cuda.device_count = refuse
import os
environment = dict(os.environ)
import vavae_fast.data, vavae_fast.models, vavae_fast.flow, vavae_fast.losses, vavae_fast.evaluation
import vavae_fast.commands.build, vavae_fast.training.loop, vavae_fast.training.dit, vavae_fast.training.tokenizer
assert dict(os.environ) == environment
assert not {"timm", "torchvision", "scipy", "sklearn", "tensorboard"} & set(sys.modules)
"""
    result, *_ = fresh(code, tmp_path)
    assert result.returncode == 0, result.stderr


# -- statuses ---------------------------------------------------------------------------------------------------------


def raising(error):
    def run(name, argv):
        raise error

    return run


@pytest.mark.parametrize(
    "error, status, said",
    [
        (BadInput("a.yaml: wrong;\n  do this"), 2, "error: a.yaml: wrong; do this\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "Disk full", "/a/b"), 2, "error: /a/b: Disk full; make room, or choose another output folder\n"),
        (OSError(errno.ENOSPC, "Disk full"), 2, "error: file system: Disk full; make room, or choose another output folder\n"),
        (OSError(errno.EIO, "I/O", "/a"), 2, "error: /a: I/O; the disk or its connection is failing; save what is there, and choose another path\n"),
        (PermissionError(errno.EACCES, "Denied", "/a"), 2, "error: /a: Denied; choose another path, or change its permissions\n"),
        (MemoryError(), 2, "error: out of memory; use a smaller batch (train.micro_batch_size, sample.per_proc_batch_size)\n"),
    ],
)  # fmt: skip
def test_what_becomes_of_errors(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(cli, "run_command", raising(error))
    assert main(["train"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), RuntimeError("ours"), ValueError("ours"), OSError(errno.EBADF, "ours")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(cli, "run_command", raising(error))
    with pytest.raises(type(error)):
        main(["train"])


def test_a_fault_of_ours_exits_with_1(tmp_path):
    code = "import vavae_fast.cli as cli\ncli.run_command = lambda *_: 1 // 0\nstatus = cli.main(['train'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


def test_debug_shows_the_traceback_and_keeps_the_status(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "no.yaml"), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("error: ")


def test_other_ranks_say_which_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): no command")


def test_a_closed_pipe_is_no_error(tmp_path):
    """`vavae-fast --help | head -1`."""
    code = "from vavae_fast.cli import main\nimport sys\nsys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        result = subprocess.run([sys.executable, "-u", "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_overview_version_and_module(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vavae-fast {vavae_fast.__version__}\n"
    result = subprocess.run([sys.executable, "-m", "vavae_fast", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"vavae-fast {vavae_fast.__version__}\n")


@pytest.mark.parametrize("argv, words", [
    (["train"], "--config"), (["train", "--config"], "--config"), (["train", "--config", "a.yaml", "--fuse"], "--fuse"),
    (["train", "--config", str(CONFIGS / "demo.yaml"), "word"], "'word': expected key.path=value"),
    (["sample", "--config", "a.yaml", "--num", "many"], "--num"),
    (["sample", "--config", "a.yaml", "--preset", "paper"], "--preset"), (["doctor", "a=1"], "a=1"), (["doctor", "--print-config"], "no config"),
    (["export", "--run", "x", "--out", "y.bin"], "--out"),
])  # fmt: skip
def test_wrong_words_are_one_line(capsys, argv, words):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, text", [("train", LIGHTNINGDIT), ("train-tokenizer", TOKENIZER)])
def test_the_printed_config_reads_back_the_same(tmp_path, capsys, command, text):
    path, again = tmp_path / "a.yaml", tmp_path / "b.yaml"
    path.write_text(text)
    override = ["train.exp_name='1e-4'", "train.log_every=7"]
    assert main([command, "--config", str(path), *override, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "log_every: 7" in printed
    again.write_text(printed)
    assert main([command, "--config", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_overrides_may_stand_among_the_flags(xl, capsys):
    argv = ["train", "train.log_every=7", "--config", str(xl), "--fused", "data.num_classes=10", "--print-config", "optimizer.lr=1e-3"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("log_every: 7", "num_classes: 10", "lr: 0.001"))


# -- dry runs ---------------------------------------------------------------------------------------------------------


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_dry_run_of_the_references_xl_predicts_and_writes_nothing(xl, tmp_path, capsys, monkeypatch):
    """675.26 M parameters and 711.8 GFLOP for a training image (forward and backward, the second twice the first)."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(xl), "--dry-run", "--world-size", "8", "train.micro_batch_size=32"]) == 0
    said = capsys.readouterr().out
    assert "675.26 M parameters" in said and "711.8 GFLOP a training image" in said
    assert "batch      1024 = 8 processes x 32 x 4 accumulated" in said
    assert "memory     about " in said and "disk       10.8 GB a checkpoint" in said and said.rstrip().endswith("nothing was written")
    assert listing(tmp_path) == ["xl.yaml"]


def test_dry_run_of_the_references_tokenizer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(TOKENIZER.replace("/data/imagenet", "/path/to/imagenet"))
    assert main(["train-tokenizer", "--config", "a.yaml", "--dry-run", "--world-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "f16d32: " in said and "foundation model dinov2" in said and "batch      256 = 4 processes x 8 x 8 accumulated" in said
    assert "100 epochs" in said and listing(tmp_path) == ["a.yaml"]


def test_world_size_is_for_dry_runs(xl, capsys):
    assert main(["train", "--config", str(xl), "--world-size", "8"]) == 2
    assert "--world-size" in capsys.readouterr().err


def test_dry_run_prints_on_rank_0_alone(xl, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", str(xl), "--dry-run", "model.model_type=LightningDiT-S/2"]) == 0
    assert capsys.readouterr().out == ""
