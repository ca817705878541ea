"""The public names of the room: all there, none of them paid for before it is used."""

import subprocess
import sys

import pytest

from fewstep import eval as evaluation


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_public_name_is_there(name):
    found = getattr(evaluation, name)
    assert found.__module__.startswith("fewstep.eval.")
    assert found.__name__ == name
    assert found.__doc__


def test_unknown_names_are_told_from_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'fud'; it has Accuracy, .*fid"):
        _ = evaluation.fud
    assert dir(evaluation) == evaluation.__all__


def test_the_room_is_light_until_a_name_is_used():
    program = (
        "import sys, fewstep.eval as e;"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules);"
        "e.fid;"
        "sys.exit(f'{heavy}' if heavy or 'torch' not in sys.modules or 'diffusers' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
