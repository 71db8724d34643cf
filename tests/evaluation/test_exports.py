"""What `vavae_fast.evaluation` offers, and what importing it costs."""

import subprocess
import sys
import types

import vavae_fast.evaluation as evaluation


def test_every_name_is_the_thing_and_not_its_file():
    """precision_recall, inception_score and uniformity are files and functions; the function must win."""
    things = {name: getattr(evaluation, name) for name in evaluation.__all__}
    assert not [name for name, thing in things.items() if isinstance(thing, types.ModuleType)]
    assert all(thing.__doc__ for name, thing in things.items() if callable(thing))


def test_importing_brings_nothing_optional():
    program = (
        "import sys, vavae_fast.evaluation;"
        "print(sorted({'scipy', 'sklearn', 'torchvision', 'timm', 'torch_fidelity'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
