"""Fused operators in a model that knows nothing of them: `patch(model)` replaces forwards, instance by instance.

Classes, parameters and state-dict keys stay as they are; `undo()` restores every instance. What is recognised, by the
name of its class and then by every part that its forward uses, stands in `patching_forms.py` (DiT, SiT, REPA,
LightningDiT, timm) and `patching_diffusers.py`:

    qk_norm_rope_attention     attention from one packed qkv, with or without norms of q and k and a 2-D rotary table
    attention                  diffusers' attention processor: attention from three projections, by a backend
    swiglu                     a feed-forward whose first layer gives gate and value, packed
    gate_add_norm_modulate     adaLN blocks: everything between the attention and the feed-forward
    norm_modulate              adaLN norms that are modules: the last layer, diffusers' AdaLayerNorm…; PixArt's blocks
    rms_norm                   an RMSNorm that stands alone

A module of such a name that differs anywhere is left alone, and the report says why. Patch before `torch.compile` and
before sharding. Where a code base compiles single forwards (LightningDiT does), the new ones are not compiled: compile
the patched blocks, `block.compile()` (all of them are one graph), or the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention_backends import check_backend
from .patching_diffusers import diffusers_form
from .patching_forms import ALREADY, FORMS, Form

OPERATORS = ("qk_norm_rope_attention", "attention", "swiglu", "gate_add_norm_modulate", "norm_modulate", "rms_norm")


@dataclass
class Handle:
    """report: module path -> "fused: <operator>" or "left: <class>, <reason>". undo() gives every module its own back."""

    report: dict[str, str]
    _replaced: list[tuple[nn.Module, str, Any]]  # module, attribute, what it was given

    def undo(self) -> None:
        """Restore every forward and processor; what somebody else has replaced since stays. A second call does nothing."""
        while self._replaced:
            module, attribute, given = self._replaced.pop()
            if vars(module).get(attribute) is not given:
                continue
            if attribute == "forward":
                del module.forward
            else:
                setattr(module, attribute, given.own)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for line in self.report.values():
            counts[line] = counts.get(line, 0) + 1
        return "\n".join(f"{count} x {line}" for line, count in counts.items())


def patch(model: nn.Module, ops: Iterable[str] | None = None, backend: str = "auto") -> Handle:
    """Let the modules of `model` that are recognised run the fused operators `ops` (default: all of `OPERATORS`).

    backend computes the attention, a name of `attention_backends.BACKENDS` or "auto". Changes speed, never keys, and
    results only by rounding. Raises ValueError, before anything is replaced, for an operator that is not known, for one
    asked for by name that no module takes, and for a backend that is not known or not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = _wanted(ops)
    check_backend("patch", backend)
    chosen, verdicts = _choose(model, wanted)
    paths = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    report = {path: verdicts[key] for path, key in paths.items() if key in verdicts}
    if ops is not None:
        _check_all_found(wanted, {form.op for _, form in chosen}, report)
    if backend == "fused" and any(form.op == "attention" for _, form in chosen):
        raise ValueError("patch: backend 'fused' needs packed qkv, diffusers projects q, k and v apart; take another backend")
    if not report:
        report = {"": f"left: {type(model).__name__}, no module in it is of a form known here"}
    replaced = []
    for module, form in chosen:
        given = form.replacement(module, backend)
        setattr(module, form.attribute, given)
        replaced.append((module, form.attribute, given))
    return Handle(report, replaced)


def _wanted(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return OPERATORS
    if isinstance(ops, str):
        raise ValueError(f"patch: ops is a list of operators, got the text {ops!r}; pass [{ops!r}]")
    if not isinstance(ops, Iterable):
        raise TypeError(f"patch: ops is a list of operators, got {ops!r}")
    wanted = tuple(ops)
    for op in wanted:
        if op not in OPERATORS:
            raise ValueError(f"patch: unknown operator {op!r}; known: {', '.join(OPERATORS)}")
    if not wanted:
        raise ValueError(f"patch: ops is empty; known operators: {', '.join(OPERATORS)}")
    return wanted


def _choose(model: nn.Module, wanted: tuple[str, ...]) -> tuple[list[tuple[nn.Module, Form]], dict[int, str]]:
    """The modules to replace, each with its form, and a report line by the id of each module that a form names.

    A module inside of one that is patched, now or before, and that the new forward does not call, is not looked at.
    """
    chosen: list[tuple[nn.Module, Form]] = []
    verdicts: dict[int, str] = {}
    inside: set[int] = set()
    for module in model.modules():
        form = _form_of(module)
        if form is None or id(module) in inside:
            continue
        reason = form.why_left(module)
        if form.op in wanted:
            verdicts[id(module)] = f"left: {type(module).__name__}, {reason}" if reason else f"fused: {form.op}"
        if reason == ALREADY or (reason is None and form.op in wanted):
            inside |= {id(getattr(module, name)) for name in form.inside}
        if reason is None and form.op in wanted:
            chosen.append((module, form))
    return chosen, verdicts


def _form_of(module: nn.Module) -> Form | None:
    cls = type(module)
    in_diffusers = cls.__module__.partition(".")[0] == "diffusers"
    return (diffusers_form(module) if in_diffusers else None) or FORMS.get(cls.__name__)


def _check_all_found(wanted: tuple[str, ...], found: set[str], report: dict[str, str]) -> None:
    for op in wanted:
        if op not in found:
            left = next((f"{path or 'the model'}: {line}" for path, line in report.items() if line.startswith("left")), None)
            raise ValueError(f"patch: no module takes {op}{f' ({left})' if left else ': none is of a form known here'}; nothing was replaced")
