"""Command lines, configs and labels that no user means, drawn by hypothesis: structure where bytes have none."""

import argparse
import importlib
import json
from pathlib import Path

import yaml
from hypothesis import strategies as st
from tiny import Tiny
from torture.subjects import drawing

from vavae_fast.cli import COMMANDS
from vavae_fast.config import LightningDiTConfig, TokenizerConfig, flatten, to_mapping

# As words of a shell can be: no NUL. The last are paths that never end, are no files, or lie where nobody should go.
NASTY = (
    "", "0", "-1", "1e999", "-1e-999", "nan", ".nan", ".inf", "null", "~", "true", "no", "012", "0x10", "1_000", "1:30", "[1, 2]", "[]", "{}",
    "{a: 1}", "[[[[[[", "*a", "&a b", "&a [*a]", "!!python/object/apply:os.system [true]", "!!binary aGk=", "!x y", "? a", "- -", "a: b: c", "\"",
    "'", "|", ">", "%", "@", "`", "2024-01-01", "=", "<<", "💥", "é\u0301", "\udcff", "a\nb", "\t", "\x1b[31m", "<script>alert(1)</script>",
    "$(true)", "-", "--", "--help", "9" * 400, "9" * 5000, "1" + "0" * 308, "-9223372036854775809", "18446744073709551616", "x" * 300, "x/" * 3000,
    "0,1,2", "1,,2", "0:5", ".", "..", "../../..", "/", "/dev/null", "/dev/zero", "/dev/urandom", "/proc/self/mem", "/proc/self/environ",
    "/nowhere/at/all", "*", "{0..3}", "{0..99999999}.tar", "builtin:", "builtin:digits", "builtin:nothing", "hub", "timm:nothing",
    "module:factory",
)  # fmt: skip

_scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.sampled_from(NASTY))
_groups = lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3))
_values = st.recursive(_scalars, _groups, max_leaves=6)
KEYS, TOKENIZER_KEYS = (sorted(flatten(to_mapping(schema()))) for schema in (LightningDiTConfig, TokenizerConfig))
_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
_likely = st.sampled_from(("0", "1", "2", "3", "4", "8", "16", "0.5", "1.0e-3", "true", "false", "auto", "none", "euler", "fp32", "null", "ema"))
_words = st.one_of(_likely, _likely, st.sampled_from(NASTY), _text, st.integers(-5, 2**40).map(str), st.floats().map(str))


def templates(tiny: Tiny) -> list[list[str]]:
    """A line of each command that would be done, as a dry run: what is changed is one word or two of it."""
    latents, samples = str(tiny.latents), str(tiny.root / "samples" / "samples.npz")
    config, images = ["--config", str(tiny.root / "tokenizer.yaml")], ["--images", str(tiny.images)]
    tokenizer, run = ["--checkpoint", str(tiny.tokenizer_run)], ["--checkpoint", str(tiny.dit_run)]
    lines = [
        ["train-tokenizer", *tiny.tokenizer()], ["train-tokenizer", *tiny.tokenizer(Path("runs"))],
        ["extract", *config, *tokenizer, *images, "--out", "new"], ["extract", *config, "--out", latents, "--stats-only"],
        ["train", *tiny.dit(Path("runs"))], ["train", *tiny.dit()], drawing(tiny, Path("samples")),
        ["evaluate", "--samples", samples, "--reference", str(tiny.images), "--metrics", "precision", "--image-size", "16"],
        ["evaluate", "--reconstruction", *config, *tokenizer, *images, "--metrics", "psnr"],
        ["analyze", "--latents", latents, "--repeats", "0", "--tokens", "20"], ["gallery", *tiny.dit(), *run, "--out", "g"],
        ["sweep", *tiny.dit(), *run, "--reference", str(tiny.images), "--out", "s", "sample.cfg_scale=1,2"],
        ["export", "--run", str(tiny.dit_run), "--out", "a.safetensors"], ["export", "--run", str(tiny.dit_run), "--out", "p", "--pipeline"],
        ["report", str(tiny.dit_run)], ["compare", str(tiny.dit_run), str(tiny.tokenizer_run), "--out", "c.html"], ["demo", "--out", "d"],
        ["reproduce", "all", "--scale", "demo", "--out", "r"], ["bench-report"],
    ]  # fmt: skip
    return [[*line, "--dry-run"] for line in lines]


def flags(name: str) -> list[str]:
    """The flags that a command has."""
    module = importlib.import_module("vavae_fast.commands." + name.replace("-", "_"))
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    of_all = ["--config", "--print-config", "--nothing"]  # not --debug, which asks for tracebacks
    return sorted(flag for action in parser._actions for flag in action.option_strings) + of_all


def keys(name: str) -> list[str]:
    """The keys of the config that a command takes; none where it takes none."""
    return [] if name in ("report", "compare", "demo", "reproduce", "bench-report", "export") else TOKENIZER_KEYS if "token" in name else KEYS


def command_lines(tiny: Tiny) -> st.SearchStrategy:
    """One of the templates, edited in one place or two; one line in ten is words of no order at all."""
    any_words = st.lists(st.one_of(st.sampled_from(sorted(COMMANDS)), _words), max_size=6)
    edited = [_edited(line) for line in templates(tiny)]
    return st.integers(0, 9).flatmap(lambda k: any_words.map(lambda words: [*words, "--dry-run"]) if k == 0 else st.one_of(*edited))


def _edited(line: list[str]) -> st.SearchStrategy:
    known = keys(line[0])
    kinds = ("replace", "remove", "flag", "flag", *(("override",) * 4 if known else ()))
    edit = st.tuples(st.sampled_from(kinds), st.integers(0, 30), _words, st.sampled_from(known or ["x"]), st.sampled_from(flags(line[0])))
    return st.lists(edit, min_size=1, max_size=2).map(lambda edits: _edit(line, edits))


def _edit(line: list[str], edits: list[tuple]) -> list[str]:
    words = list(line[:-1])
    for kind, place, value, key, flag in edits:
        at = 1 + place % max(len(words) - 1, 1)
        if kind == "replace" and at < len(words):
            words[at] = words[at].partition("=")[0] + "=" + value if "=" in words[at] and not words[at].startswith("-") else value
        elif kind == "remove" and at < len(words):
            del words[at]
        elif kind == "override":
            words.append(f"{key}={value}")
        elif kind == "flag":
            words += [flag, value]
    return [*words, line[-1]]


def configs() -> st.SearchStrategy:
    """YAML of a config with any value under any key, its groups torn apart at times."""
    return st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), _values, max_size=4).map(_as_yaml)


def _as_yaml(values: dict) -> bytes:
    whole: dict = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = whole
        for group in groups:
            place = place.setdefault(group, {}) if isinstance(place.get(group, {}), dict) else {}
        place[last] = value
    return yaml.dump(whole, allow_unicode=True).encode("utf-8", "surrogatepass")


def label_files() -> st.SearchStrategy:
    """EDM2's dataset.json with any label for any name."""
    names = st.one_of(st.sampled_from(("a.png", "b.png", "../a.png", "")), _scalars)
    pairs = st.lists(st.one_of(st.tuples(names, _scalars), _values), max_size=4)
    whole = st.one_of(st.fixed_dictionaries({"labels": st.one_of(pairs, _values)}), _values)
    return whole.map(lambda value: json.dumps(value).encode())
