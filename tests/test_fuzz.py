"""Whatever is written in a sweep file, a spec or a saved file: one clear error, or a right result; never another exception.

A hundred examples each, always the same. ``python benchmarks/fuzz.py`` runs these tests with more, and new ones.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as unpacked

from fewstep import artifact
from fewstep.errors import FewstepError
from fewstep.eval import Moments, Results, Sweep
from fewstep.eval.distribution import feature_set, moments
from fewstep.eval.distribution.feature_set import FeatureSet
from fewstep.eval.sweeps import manifest
from fewstep.eval.sweeps.results import Row
from fewstep.eval.sweeps.specs import call_spec, numbers, split_top_level, whole_numbers
from fewstep.eval.sweeps.state import status
from fewstep.samplers import DDIM, Grid, NoiseSchedule, SolverPlan, parse_spec

EXAMPLES = int(os.environ.get("FEWSTEP_FUZZ", "0"))
PHASES = (Phase.explicit, Phase.generate)
fuzz = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=PHASES,
)


@contextlib.contextmanager
def one_clear_error():
    """Lets a FewstepError pass, and nothing else."""
    with warnings.catch_warnings(), contextlib.suppress(FewstepError):
        warnings.simplefilter("error", SyntaxWarning)  # of Python about what a user wrote
        yield


# -- texts -------------------------------------------------------------------------------------------------------------

PIECES = [
    "DDIM", "DPMSolver", "UniPC", "diffusers:", "DDIMScheduler", "(", ")", "[", "]", "{", "}", ",", "=", ":", "'", '"', " ",
    "solver_order", "grid", "karras", "interval", "3", "-1", "1e999", "True", "none", "*", "**", "lambda: 0", "\x00", "\\", "\n",
    "#", "5", "2.5", "nan", "x" * 50, "9" * 5000, "(" * 300, "-" * 5000, "{[]: 1}", "{**x}", "{1}", "'\\d'", "b'a'", "٣", "_",
]  # fmt: skip
CALLS = st.builds(
    "{}({}={})".format,
    st.sampled_from(["DDIM", "DPMSolver", "diffusers:DDIMScheduler", "X"]),
    st.sampled_from(["solver_order", "grid", "timestep_spacing", "no_such"]),
    st.one_of(
        st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3), st.binary(max_size=3),
        st.complex_numbers(), st.sets(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    ).map(repr),
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join), CALLS)


@fuzz
@given(TEXTS)
def test_scheduler_specs(text):
    with one_clear_error():
        spec = parse_spec(text)
        assert parse_spec(str(spec)) == spec
        assert spec.scheduler_class.__name__ == spec.name


@fuzz
@given(TEXTS)
def test_lists_are_split_where_they_may_be(text):
    with one_clear_error():
        items = split_top_level(text)
        assert all(item and item == item.strip() for item in items)
        assert split_top_level(", ".join(items)) == items


@fuzz
@given(TEXTS)
def test_specs_of_transforms(text):
    with one_clear_error():
        name, options = call_spec(text, "cache")
        assert name.isidentifier()
        assert all(key.isidentifier() for key in options)


@fuzz
@given(TEXTS)
def test_numbers_on_one_line(text):
    with one_clear_error():
        assert all(isinstance(value, int) for value in whole_numbers(text, "steps"))
    with one_clear_error():
        assert all(isinstance(value, float) for value in numbers(text, "guidance"))


# -- the sweep file ----------------------------------------------------------------------------------------------------

INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 10, 1000, 2**31, 2**63, 10**30]) | st.integers()
ATOMS = st.one_of(
    st.booleans(), INTEGERS, st.floats(), TEXTS,
    st.sampled_from(["DDIM", "DPMSolver(solver_order=3)", "karras", "ays", "none", "default", "fid", "cpu", "fashion-sd", "."]),
)  # fmt: skip
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=5,
)
RULES = st.dictionaries(
    st.sampled_from(["model", "scheduler", "grid", "steps", "guidance", "cache", "quant", "seed", "x"]),
    VALUES,
    max_size=2,
)
KEYS = {
    "model": VALUES, "schedulers": VALUES, "steps": VALUES | st.lists(INTEGERS, max_size=3), "grids": VALUES,
    "guidance": VALUES | st.lists(st.floats(), max_size=3), "caches": VALUES, "quants": VALUES, "samples": INTEGERS | VALUES,
    "blocks": INTEGERS | VALUES, "seed": INTEGERS | VALUES, "batch_size": INTEGERS | VALUES, "limit": INTEGERS | VALUES,
    "prompts": VALUES, "prompts_file": VALUES, "metrics": VALUES, "call": VALUES, "device": VALUES,
    "trackers": VALUES, "fidelity": VALUES | st.sampled_from(["same", "same@9", "DDIM@3", "DDIM@x", "@", "UniPC@"])
    | st.dictionaries(st.sampled_from(["reference", "lpips", "features", "x"]), VALUES, max_size=2),
    "exclude": st.lists(RULES, max_size=2) | VALUES,
}  # fmt: skip
TABLES = st.fixed_dictionaries({}, optional=KEYS).flatmap(
    lambda table: st.sampled_from(
        [
            table,
            {"schedulers": ["DDIM"], "steps": [2], **table},
            {"schedulers": ["DDIM"], "steps": [2]} | dict(itertools.islice(table.items(), 1)),
        ]
    )
)


def toml(value) -> str:
    """As TOML; a table inside a value is an inline table."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in value) + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def assert_sweep_or_error(path: Path) -> None:
    with one_clear_error():
        sweep = Sweep.from_file(path)
        assert sweep.cells
        assert all(cell.steps >= 1 and 0 <= cell.guidance < math.inf for cell in sweep.cells)


@fuzz
@given(table=TABLES)
def test_sweep_files(folder, table):
    path = folder / "sweep.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in table.items()), encoding="utf-8")
    assert_sweep_or_error(path)


@fuzz
@given(
    content=st.binary(max_size=60)
    | st.lists(
        st.sampled_from(["steps", "=", "[", "]", "{", "a", "\n", "1", '"', ".", "[" * 3000, "9" * 5000, "1979-99-99"]),
        max_size=8,
    ).map(lambda parts: "".join(parts).encode())
)
def test_sweep_files_that_are_no_toml(folder, content):
    path = folder / "raw.toml"
    path.write_bytes(content)
    assert_sweep_or_error(path)


# -- saved files -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def save_sweep(folder: Path) -> None:
    row = Row(
        "DDIM",
        2,
        1.0,
        "ok",
        folder="cells/a",
        samples=2,
        calls=2.0,
        metrics={
            "fid": {"value": 1.5, "recipe": "r", "n": 2},
            "psnr": {"value": "inf", "recipe": "p", "n": 2, "worst": {"0": 30.5, "1": "inf"}},
        },
    )
    Results(("fid", "psnr"), 1, (row,)).save(folder)
    written = manifest.Manifest(folder, {"samples": 2, "cells": [row.cell.axes]}, ["fewstep"])
    written.begin({**row.cell.axes, "folder": "cells/a"})
    written.cell({**row.cell.axes, "folder": "cells/a", "status": "ok"})


def check_results(folder: Path) -> None:
    results = Results.load(folder)
    assert results.to_csv()
    assert all(row.cell.title and isinstance(row.metrics, dict) for row in results.rows)


def check_manifest(folder: Path) -> None:
    found = manifest.load(folder)
    assert not found or {"sweep", "sessions", "cells"} == set(found)
    status(folder)


def check_moments(folder: Path) -> None:
    found = Moments.load(folder / "moments.safetensors")
    assert found.count >= 0
    assert found.m2.shape == (found.dim, found.dim)
    assert found.mean.dtype == found.m2.dtype == torch.float64
    assert bool(found.m2.isfinite().all())
    assert all(isinstance(value, str | int) for value in found.recipe.values())


def check_features(folder: Path) -> None:
    found = FeatureSet.load(folder / "features.safetensors")
    assert found.values.ndim == 2
    assert found.double.isfinite().all()
    assert all(isinstance(value, str | int) for value in found.recipe.values())


def check_grid(folder: Path) -> None:
    grid = Grid.load(folder / "grid.json", schedule())
    assert bool((grid.lam.diff() > 0).all())


def check_plan(folder: Path) -> None:
    plan = SolverPlan.load(folder / "plan.json", schedule())
    assert plan.steps >= 1
    assert plan.fingerprint == schedule().fingerprint
    assert plan.nfe <= plan.steps
    assert isinstance(repr(plan), str)


LOADERS = {
    "results.json": check_results,
    "manifest.json": check_manifest,
    "moments.json": check_moments,
    "moments.safetensors": check_moments,
    "features.json": check_features,
    "features.safetensors": check_features,
    "grid.json": check_grid,
    "plan.json": check_plan,
    "plan-*.safetensors": check_plan,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One of each, whole."""
    folder = tmp_path_factory.mktemp("saved")
    save_sweep(folder)
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    Moments.of(features, {"net": "n"}).save(folder / "moments")
    FeatureSet(features, {"net": "n"}).save(folder / "features")
    grid = Grid.karras(schedule(), 4)
    grid.save(folder / "grid.json")
    DDIM().compile(schedule(), grid).save(folder / "plan.json")
    for name, check in LOADERS.items():
        assert list(folder.glob(name)), name
        check(folder)
    return folder


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Cut off, bits flipped, bytes put in, or something else altogether."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["cut", "flip", "insert", "other"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(
                    st.binary(max_size=9) | st.sampled_from([b"9" * 5000, b"[" * 5000, b"NaN", b"1e999"])
                )
            case _:
                data = bytearray(draw(st.binary(max_size=20)))
    return bytes(data)


@pytest.mark.parametrize("name", LOADERS)
@fuzz
@given(data=st.data())
def test_damaged_files(saved, name, data):
    (path,) = saved.glob(name)
    with replaced(path, data.draw(damaged(path.read_bytes()))), one_clear_error():
        LOADERS[name](saved)


def paths(value, before=()):
    """The place of every value inside."""
    yield before
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*before, key))


@pytest.mark.parametrize("name", [name for name in LOADERS if name.endswith(".json")])
@fuzz
@given(data=st.data())
def test_files_with_another_value_somewhere(saved, name, data):
    """As by hand, or of a foreign program: sound JSON, and no checksum to tell that it was changed."""
    (path,) = saved.glob(name)
    body = json.loads(path.read_text())
    if name in ("results.json", "manifest.json"):
        body.pop("sha256")
    *parents, last = data.draw(st.sampled_from([place for place in paths(body) if place]))
    owner = functools.reduce(lambda value, key: value[key], parents, body)
    if data.draw(st.booleans()):
        owner[last] = data.draw(JSON)
    else:
        del owner[last]
    with replaced(path, json.dumps(body).encode()), one_clear_error():
        LOADERS[name](saved)


TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8]),
    st.sampled_from([0.0, 1.0, -2.0, math.nan, math.inf]),
)


@pytest.mark.parametrize("name", ["moments", "features", "plan"])
@fuzz
@given(data=st.data())
def test_files_with_another_array(saved, name, data):
    """Arrays of any shape and kind, their checksum being right."""
    (path,) = saved.glob("plan-*.safetensors") if name == "plan" else [saved / f"{name}.safetensors"]
    record = saved / f"{name}.json"
    tensors = unpacked(path.read_bytes())
    tensors[data.draw(st.sampled_from(sorted(tensors)))] = data.draw(TENSORS)
    arrays, whole = path.read_bytes(), record.read_bytes()
    try:
        digest = artifact.write_tensors(path, tensors)
        body = json.loads(whole)
        body["arrays_sha256" if name == "plan" else "sha256"] = digest
        record.write_text(json.dumps(body))
        with one_clear_error():
            LOADERS[f"{name}.json"](saved)
    finally:
        path.write_bytes(arrays)
        record.write_bytes(whole)


def test_the_kinds_of_files_are_those_of_the_readers():
    assert {moments.KIND, feature_set.KIND, manifest.KIND} == {"moments", "features", "sweep manifest"}
