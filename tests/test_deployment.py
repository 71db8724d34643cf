"""Dockerfile, Slurm script and CI workflow: what can be known of them without Docker, a cluster or GitHub."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "slurm.sbatch"
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CONSTRAINTS = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed: pip install 'vavae-fast[dev]'")


# -- Docker -----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def arguments() -> dict[str, str]:
    return {name: value.strip('"') for word, rest in instructions() if word == "ARG" for name, value in [rest.split("=", 1)]}


def test_the_dockerfile_is_lint_free():
    done = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that fits a path, or a folder around it, decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        around = [path, *map(str, Path(path).parents)]
        if line and not line.startswith("#") and any(fnmatch(p, pattern) or fnmatch("/" + p, pattern.removeprefix("**")) for p in around):
            out = not line.startswith("!")
    return out


def test_what_is_copied_is_there_and_is_sent():
    copied = [words.split()[:-1] for word, words in instructions() if word == "COPY" and "--from" not in words]
    sources = [source for words in copied for source in words]
    assert {"constraints.txt", "pyproject.toml", "vavae_fast", "kernels", "csrc", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and not ignored(source), source
    assert not ignored("vavae_fast/models/lightningdit.py") and not ignored("csrc/storage.h")
    for path in (".git/config", "tests/conftest.py", "runs/demo/report.html", "vavae_fast/__pycache__/cli.cpython-311.pyc"):
        assert ignored(path), f"{path} would be sent to the builder"


def test_the_wheel_needs_no_more_than_what_is_copied():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {Path(path).parts[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    needed |= {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    copied = {Path(source).parts[0] for word, words in instructions() if word == "COPY" for source in words.split()[:-1]}
    assert needed <= copied


def test_versions_are_pinned_and_agree():
    given, tomllib = arguments(), pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    cuda = "".join(given["CUDA_VERSION"].split(".")[:2])
    assert re.fullmatch(r"\d+\.\d+\.\d+", given["CUDA_VERSION"]) and given["TORCH_INDEX"].endswith(f"/cu{cuda}")
    assert f"cuda-minimal-build-{'-'.join(given['CUDA_VERSION'].split('.')[:2])}" in DOCKERFILE
    assert re.fullmatch(r"[0-9a-f]{40}", given["APEX_COMMIT"])
    bases = [words.split()[0] for word, words in instructions() if word == "FROM"]
    assert all(re.fullmatch(r"nvidia/cuda:\$\{CUDA_VERSION\}-\w+-ubuntu\$\{UBUNTU_VERSION\}", base) for base in bases) and len(bases) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["dali"][0].startswith(f"nvidia-dali-cuda{cuda}")
    for name, extra in (("FLASH_ATTN_VERSION", "flash"), ("XFORMERS_VERSION", "xformers")):
        oldest = extras[extra][0].split(">=")[1]
        assert [*map(int, re.findall(r"\d+", given[name]))] >= [*map(int, oldest.split("."))]
    named = re.search(r'vavae-fast\[([\w,]+)\]"', DOCKERFILE)[1].split(",")
    assert set(named) <= set(extras)
    assert set(CONSTRAINTS) == {"torch", "torchvision"} and "--constraint constraints.txt --index-url" in DOCKERFILE
    assert all("==" in word for word in re.search(r"RUN pip install (setuptools.*)", DOCKERFILE)[1].split())


def test_apex_is_nvidias_and_the_user_is_not_root():
    assert "https://github.com/NVIDIA/apex" in DOCKERFILE and not re.search(r"pip install [^\n]*\bapex\b(?!$| )", DOCKERFILE.replace("./apex", ""))
    words = [word for word, _ in instructions()]
    user = next(rest for word, rest in instructions() if word == "USER")
    assert user not in ("root", "0") and words.index("USER") < len(words) - words[::-1].index("RUN") - 1, "the smoke test runs as that user"
    smoke = [rest for word, rest in instructions() if word == "RUN"][-1]
    assert smoke.startswith("vavae-fast doctor") and "--gpus" not in smoke


# -- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["scripts/slurm.sbatch", ".ci/run", "benchmarks/gpu.sh"])
def test_scripts_are_lint_free(script):
    done = subprocess.run([tool("shellcheck"), str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def cluster(tmp_path):
    """A cluster of one node: srun runs here what it is given, scontrol notes what is queued again."""
    bin, queue = tmp_path / "bin", tmp_path / "queue"
    bin.mkdir()
    programs = {
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
        "scontrol": f'case $1 in show) echo localhost; echo node2;; *) echo "$@" >> {queue};; esac',
    }
    for name, text in programs.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    with socket.socket() as found:  # of the ports that the script chooses from, by the job's number
        job = next(job for job in range(os.getpid() % 9000, 10000) if found.connect_ex(("127.0.0.1", 20000 + job)) != 0)
    slurm = dict(SLURM_JOB_ID=str(job), SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1", OMP_NUM_THREADS="1")
    environment = os.environ | slurm | dict(PATH=f"{bin}:{BIN}:{os.environ['PATH']}")

    class Cluster:
        job_id = str(job)

        def torchrun(self, text: str) -> None:
            (bin / "torchrun").write_text(f"#!/bin/bash\n{text}\n")
            (bin / "torchrun").chmod(0o755)

        def sbatch(self, *words: str) -> subprocess.Popen:
            return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, cwd=tmp_path, text=True, stderr=subprocess.PIPE)

        def queued(self) -> list[str]:
            return queue.read_text().splitlines() if queue.exists() else []

    return Cluster()


def appears(path: Path, process: subprocess.Popen, text: str = "", seconds: float = 120) -> None:
    """Wait until the file holds the text, unless the process ends before."""
    began = time.monotonic()
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < seconds, path
        time.sleep(0.02)


def test_what_slurm_is_asked_for():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE))
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= set(asked) and asked["ntasks-per-node"] == "1" and asked["open-mode"] == "append"
    who, name, seconds = re.fullmatch(r"(B):(\w+)@(\d+)", asked["signal"]).groups()
    given = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", SCRIPT.read_text())[1])
    assert name == "USR1" and given < int(seconds), "time to save in, within the time left"


def test_the_job_starts_torchrun_and_has_its_status(cluster, tmp_path):
    cluster.torchrun(f'echo "$@" > {tmp_path / "words"}; exit 3')
    job = cluster.sbatch("train", "--config", "x y.yaml", "--fused")
    assert job.wait(60) == 3 and cluster.queued() == []
    words = (tmp_path / "words").read_text()
    assert f"--rdzv-endpoint localhost:{20000 + int(cluster.job_id) % 10000} " in words and f"--rdzv-id {cluster.job_id}.0 " in words
    assert "--nnodes 1 --nproc-per-node 1 " in words and words.strip().endswith("-m vavae_fast train --config x y.yaml --fused")
    assert "SIGUSR1" in words
    cluster.torchrun("exit 0")
    assert cluster.sbatch("train").wait(60) == 0 and cluster.queued() == []


def test_a_job_whose_time_is_up_passes_the_signal_on_waits_and_is_queued_again(cluster, tmp_path):
    cluster.torchrun(f"trap 'sleep 0.3; echo saved > {tmp_path / 'saved'}; exit 1' USR1; echo up > {tmp_path / 'up'}; while :; do sleep 0.05; done")
    job = cluster.sbatch("train")
    appears(tmp_path / "up", job, "up")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0 and (tmp_path / "saved").exists()
    assert cluster.queued() == [f"requeue {cluster.job_id}"]


def test_without_a_command_it_says_what_to_give(cluster):
    job = cluster.sbatch()
    assert job.wait(60) == 2 and "vavae-fast" in job.stderr.read()


@pytest.mark.slow  # a start of torchrun and of what it starts: ten seconds of imports each
def test_a_run_ends_as_it_would_have_though_its_time_was_up(cluster, tmp_path):
    from processes import main, prepare, words

    prepare(tmp_path)
    run = tmp_path / "run"
    job = cluster.sbatch(*words(tmp_path, "run", "train.max_steps=100000", "train.ckpt_every=100000"))
    appears(run / "metrics.jsonl", job, '"step"')
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, job.stderr.read()
    assert cluster.queued() == [f"requeue {cluster.job_id}"]
    saved = max(int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").glob("step_*"))
    assert main(words(tmp_path, "run", f"train.max_steps={saved + 2}", "train.ckpt_every=100000")) == 0  # what the job queued again does
    assert (run / "checkpoints" / f"step_{saved + 2:08d}").is_dir()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    assert steps == sorted(set(steps)) and steps[-1] == saved + 2


# -- CI ---------------------------------------------------------------------------------------------------------------


def test_the_workflow_does_what_ci_does():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    test, build = workflow["jobs"]["test"], workflow["jobs"]["build"]
    commands = [step["run"] for step in test["steps"] if "run" in step]
    assert commands == [".ci/run"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    oldest = re.search(r'requires-python = ">=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert test["strategy"]["matrix"]["python"][0] == oldest and all(isinstance(version, str) for version in test["strategy"]["matrix"]["python"])
    assert "python -m build" in [step.get("run") for step in build["steps"]]
    assert workflow["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu"), "a build of torch without CUDA"
    for job in (test, build):
        setup = next(step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
        assert setup["cache"] == "pip" and all((ROOT / path).is_file() for path in setup["cache-dependency-path"].split())
