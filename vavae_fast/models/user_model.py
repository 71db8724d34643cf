"""A user's own foundation model by import path, which only a command line gives: the code that it names runs."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vavae_fast.errors import BadInput, is_integer

_WANTED = "expected a torch.nn.Module with .feature_dim and forward(images (B, 3, H, W) in [-1, 1]) -> features (B, feature_dim, h, w)"


def load_user_model(import_path: str, image_size: int, flag: str = "--foundation") -> nn.Module:
    """What `factory()` of "package.module:factory" returns, checked with one image of image_size pixels.

    Modules are looked for where Python looks, and then in the current folder. `BadInput`, of one line, for all that goes
    wrong, in the user's code too; --debug shows its traceback.
    """
    name = f"{flag} {import_path}"
    factory = _factory(import_path, name)
    with _users_code(f"{name}: {import_path.partition(':')[2]}() failed"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise BadInput(f"{name}: returned an object of type {type(model).__name__}; {_WANTED}")
    dim = getattr(model, "feature_dim", None)
    if not is_integer(dim) or dim < 1:
        raise BadInput(f"{name}: .feature_dim of {type(model).__name__} is {dim!r}; set it to the number of channels of its features")
    model.eval()
    with _users_code(f"{name}: its forward failed on one image (1, 3, {image_size}, {image_size})"), torch.no_grad():
        features = model(torch.zeros(1, 3, image_size, image_size))
    _check_features(features, dim, name)
    return model


def _factory(import_path: str, name: str) -> Callable[[], object]:
    module_name, _, attribute = import_path.partition(":")
    if not attribute or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise BadInput(f"{name}: not an import path; give package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file here hides no installed module
    found = _module(module_name, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{name}: {module_name} has no {attribute!r}; name a function or class that returns the model")
        found = getattr(found, part)
    if not callable(found):
        raise BadInput(f"{name}: {attribute} is of type {type(found).__name__}; name a function or class that returns the model")
    return found


def _module(module_name: str, name: str) -> object:
    with _users_code(f"{name}: importing {module_name} failed"):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # one that it imports itself
    raise BadInput(f"{name}: no module {module_name!r} here or on Python's path; run where it lies, or set PYTHONPATH")


def _check_features(features: object, dim: int, name: str) -> None:
    if not isinstance(features, Tensor):
        raise BadInput(f"{name}: its forward returned an object of type {type(features).__name__}; {_WANTED}")
    shape = tuple(features.shape)
    if len(shape) != 4 or shape[:2] != (1, dim) or 0 in shape:
        raise BadInput(f"{name}: one image gave features {shape}, expected (1, {dim}, h, w) by its .feature_dim; return maps, not tokens")
    if not features.is_floating_point():
        raise BadInput(f"{name}: its features are {features.dtype}; return floating point")
    if not bool(features.isfinite().all()):
        raise BadInput(f"{name}: a grey image (zeros) gave features that are not finite; check its weights")


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Any exception of the code in it as one line."""
    try:
        yield
    except Exception as error:  # a user's code may raise anything
        lines = str(error).strip().splitlines()
        raise BadInput(f"{what} ({type(error).__name__}{': ' + lines[0][:160] if lines else ''}); --debug shows where") from error

