"""The command line: what it prints, what it writes, and one line with exit code 2 for every mistake."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep import cli
from fewstep.eval.sweeps.specs import split_top_level, whole_numbers


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_needs_neither_torch_nor_diffusers():
    program = (
        "import sys; from fewstep import cli; code = cli.run(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("models", "doctor", "generate", "sweep", "status", "report", "compare", "best"):
        assert command in done.stdout


def test_no_arguments_is_help():
    done = subprocess.run(
        [sys.executable, "-c", "from fewstep.cli import main; main([])"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_the_version_is_told(capsys):
    assert run(capsys, "--version") == (0, f"fewstep {fewstep.__version__}\n", "")


def test_models_are_listed(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert "fashion-sd" in out


def test_doctor_says_what_is_there_and_what_is_missing(capsys):
    import torch

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in out
    assert "device cpu" in out
    assert "float32" in out
    for extra in ("quant", "search", "metrics", "ray"):
        assert f"[{extra}]" in out


SWEEP = ("sweep", "--schedulers", "DPMSolver", "--steps", "2", "--samples", "2", "--batch-size", "2", "--out", "OUT")
GENERATE = ("generate", "--prompt", "a dress", "--steps", "2", "--n", "2", "--out", "OUT.png")


def changed(base: tuple[str, ...], option: str, value: str) -> tuple[str, ...]:
    """The command with one option replaced or added."""
    if option not in base:
        return (*base, option, value)
    at = base.index(option)
    return (*base[: at + 1], value, *base[at + 2 :])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("frobnicate",), "frobnicate"),
        (("sweep", "--steps", "5", "--out", "OUT"), "--schedulers"),
        (("report",), "DIR"),
        (("report", "OUT"), "holds no results.json"),
        (changed(SWEEP, "--schedulers", "DPMSolvr"), "DPMSolvr"),
        (changed(SWEEP, "--schedulers", "DPMSolver(solver_ordr=3)"), "solver_ordr"),
        (changed(SWEEP, "--schedulers", "DPMSolver(solver_order=2"), "lacks a closing"),
        (changed(SWEEP, "--schedulers", "diffusers:NoSuchScheduler"), "NoSuchScheduler"),
        (changed(SWEEP, "--schedulers", "DPMSolver,DPMSolver"), "twice"),
        (changed(SWEEP, "--schedulers", ","), "schedulers is []"),
        (changed(SWEEP, "--steps", "5,x"), "steps has 'x'; give whole numbers"),
        (changed(SWEEP, "--steps", "0"), "steps is 0; give a whole number of at least 1"),
        (changed(SWEEP, "--samples", "-3"), "samples is -3"),
        (changed(SWEEP, "--samples", "many"), "'many'"),
        ((*SWEEP, "--limit=few"), "'few'"),
        (changed(SWEEP, "--limit", "1"), "limit is 1"),
        (changed(SWEEP, "--batch-size", "0"), "batch_size is 0"),
        (changed(SWEEP, "--guidance", "nan"), "guidance is nan"),
        (changed(SWEEP, "--seed", "-1"), "seed is -1"),
        (changed(SWEEP, "--model", "fashion-xl"), "fashion-xl"),
        (changed(SWEEP, "--device", "abacus"), "abacus"),
        (changed(SWEEP, "--speed", "3"), "--speed"),
        (SWEEP[:1] + SWEEP[3:], "--schedulers is missing"),
        (SWEEP[:3] + SWEEP[5:], "--steps is missing"),
        (SWEEP[:-2], "--out is missing"),
        (("sweep", "OUT.toml", "--out", "OUT"), "cannot be read"),
        (changed(SWEEP, "--guidance", "1,high"), "guidance has 'high'; give numbers"),
        (changed(SWEEP, "--grids", "karas"), "did you mean 'karras'"),
        (changed(SWEEP, "--caches", "DeepCash(interval=3)"), "unknown cache 'DeepCash'"),
        (changed(SWEEP, "--quants", "Int3"), "unknown quant 'Int3'"),
        (changed(SWEEP, "--blocks", "0"), "blocks is 0"),
        (changed(SWEEP, "--metrics", "fud"), "unknown metric 'fud'"),
        (("status", "OUT"), "holds no manifest.json"),
        (("compare", "OUT", "OUT"), "holds no results.json"),
        (("compare", "OUT"), "B"),
        (("best", "OUT", "--budget", "nfe<=10"), "holds no results.json"),
        (changed(GENERATE, "--scheduler", "Eulr"), "Eulr"),
        (changed(GENERATE, "--model", "fashion-xl"), "fashion-xl"),
        (changed(GENERATE, "--steps", "0"), "steps is 0"),
        (changed(GENERATE, "--n", "0"), "n is 0"),
        (changed(GENERATE, "--seed", "-1"), "seed is -1"),
        (changed(GENERATE, "--guidance", "inf"), "guidance is inf"),
        (changed(GENERATE, "--out", "OUT.jpg"), ".png"),
        (GENERATE[:1] + GENERATE[3:], "--prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, command, said):
    command = [part.replace("OUT", str(tmp_path / "out")) for part in command]
    code, out, err = run(capsys, *command)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_belongs_is_refused(capsys, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, err = run(capsys, *[part.replace("OUT", str(tmp_path / "out")) for part in SWEEP])
    assert code == 2
    assert "give a folder" in err
    assert (tmp_path / "out").read_text() == "mine"


def test_generate_writes_a_grid_that_its_seeds_determine(capsys, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command = changed(changed(GENERATE, "--seed", str(seed)), "--out", str(tmp_path / f"{name}.png"))
        code, out, _ = run(capsys, *command)
        assert code == 0
        assert "4 NFE/image" in out  # 2 steps, each with both halves of the guidance
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert a.shape == (32, 65)
    assert np.array_equal(a, b)
    # Seed 4 is the second image there and the first here: the same image, up to the rounding of another place in a batch.
    assert np.abs(a[:, 33:].astype(int) - c[:, :32].astype(int)).max() <= 1


def test_a_sweep_and_its_report(capsys, tmp_path):
    command = changed(SWEEP, "--schedulers", "DPMSolver, diffusers:UniPCMultistepScheduler(solver_order=3)")
    code, out, err = run(capsys, *[part.replace("OUT", str(tmp_path)) for part in command])
    assert code == 0, err
    assert "DPMSolver" in out
    assert "FID" in out
    code, out, _ = run(capsys, "report", tmp_path)
    assert code == 0
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in out
    assert "diffusers:UniPCMultistepScheduler(solver_order=3)" in page
    assert "clip_score[fashion" in page


def test_a_failed_cell_is_exit_code_1(capsys, tmp_path):
    """diffusers' DDIM refuses more steps than it was trained with; the other cell is there all the same."""
    command = changed(changed(SWEEP, "--schedulers", "diffusers:DDIMScheduler"), "--steps", "2000,2")
    code, out, _ = run(capsys, *[part.replace("OUT", str(tmp_path)) for part in command])
    assert code == 1
    assert "failed" in out
    assert (tmp_path / "results.csv").read_text().count(",ok,") == 1


def test_a_file_with_options_over_it_is_tried_run_looked_at_and_compared(capsys, tmp_path):
    """The embedded model at 2 steps: the whole way that a user goes."""
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(
        'schedulers = ["DPMSolver"]\nsteps = [2]\nguidance = [1.0, 2.0]\nsamples = 500\nmetrics = ["accuracy"]'
    )
    command = ("sweep", file, "--limit", "4", "--batch-size", "4", "--device", "cpu")
    code, said, err = run(capsys, *command, "--dry-run")
    assert code == 0, err
    assert "2 cells, 8 images to draw, 4 network calls, about" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.toml"]

    code, said, err = run(capsys, *command, "--out", out)
    assert code == 0, err
    assert "guidance" in said

    code, said, _ = run(capsys, "status", out)
    assert code == 0
    assert "finished: 2 of 2 cells done, 0 failed" in said

    code, said, _ = run(capsys, "best", out, "--budget", "nfe<=2")
    assert code == 0
    assert "DPMSolver, 2 steps, guidance 1: accuracy" in said
    assert run(capsys, "best", out, "--budget", "nfe<=1")[0] == 2

    cells = sorted((out / "cells").iterdir(), key=lambda cell: '"guidance": 2.0' in (cell / "cell.json").read_text())
    code, said, _ = run(capsys, "compare", *cells)
    assert code == 0
    assert "guidance: 1.0 -> 2.0" in said
    assert "nfe_per_image 2 -> 4" in said
    assert "accuracy" in said


def test_the_state_of_a_sweep_with_a_failed_cell_is_exit_code_1(capsys, tmp_path):
    from tests.eval_fixtures import tiny_sweep

    sweep = tiny_sweep(steps=(2000, 2), schedulers=("diffusers:DDIMScheduler",), metrics=(), guidance=(1.0, 2.0))
    sweep.run(tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "DDIMScheduler, 2 steps" in line]
    assert all(any(f"2 steps, guidance {scale}: " in line for line in told) for scale in (1, 2))
    code, out, _ = run(capsys, "status", tmp_path)
    assert code == 1
    assert "2 of 4 cells done, 2 failed" in out
    for scale in (1, 2):
        assert f"failed: diffusers:DDIMScheduler, 2000 steps, guidance {scale}: ValueError" in out


def test_generate_takes_any_saved_pipeline_and_asks_it_as_its_family_wants(capsys, tmp_path):
    from tests.eval_fixtures import tiny_dit, tiny_unconditional

    tiny_dit().save_pretrained(tmp_path / "dit")
    tiny_unconditional().save_pretrained(tmp_path / "pixel")
    for model, prompt, nfe in (("dit", ("--prompt", "1"), "4 NFE/image"), ("pixel", (), "2 NFE/image")):
        command = ("generate", "--model", tmp_path / model, *prompt, "--steps", 2, "--n", 2, "--device", "cpu")
        code, out, err = run(capsys, *command, "--scheduler", "DDIM", "--out", tmp_path / f"{model}.png")
        assert code == 0, err
        assert nfe in out
        assert Image.open(tmp_path / f"{model}.png").size == (33, 16)
    code, _, err = run(capsys, *command[:2], tmp_path / "dit", "--out", tmp_path / "x.png")
    assert code == 2
    assert "give --prompt" in err


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("DDIM", ["DDIM"]),
        ("DDIM, UniPC ,", ["DDIM", "UniPC"]),
        ("A(b=1, c=[2, 3]),D", ["A(b=1, c=[2, 3])", "D"]),
        ("A(b='x,y)'),C(d=\"(,\")", ["A(b='x,y)')", 'C(d="(,")']),
        ("", []),
    ],
)
def test_lists_are_split_at_the_top_level_only(text, items):
    assert split_top_level(text) == items


@pytest.mark.parametrize("text", ["A(b=1", "A)", "A([)]", "A('b)"])
def test_unbalanced_lists_are_refused(text):
    with pytest.raises(ValueError, match="clos"):
        split_top_level(text)


def test_whole_numbers():
    assert whole_numbers("5, 8,10", "steps") == [5, 8, 10]
    with pytest.raises(ValueError, match=r"steps has '2\.5'"):
        whole_numbers("5,2.5", "steps")
