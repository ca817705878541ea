"""``fewstep quantize`` and the backends of ``fewstep doctor``."""

import json

import pytest
import torch

from fewstep import cli, pipelines, quant


def run(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_network_is_quantised_from_the_command_line_and_loads_without_its_weights(tmp_path, capsys):
    code, out, err = run(
        capsys, "quantize", "--model", "fashion-dit-small", "--config", "Int8(keep=('edge', 'embedding', 'attention'))",
        "--out", tmp_path / "int8", "--samples", 2, "--steps", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "output error" in out
    assert "kept transformer_blocks.0.attn1.to_q: attention layer" in out
    source = pipelines.load("fashion-dit-small").transformer
    with torch.device("meta"):
        empty = type(source).from_config(source.config)
    plan = quant.load_(empty.eval(), tmp_path / "int8")
    assert len(plan.layers) > 5
    assert not any(p.is_meta for p in (*empty.parameters(), *empty.buffers()))


def test_a_plan_is_printed_and_nothing_written(tmp_path, capsys):
    code, out, _ = run(
        capsys, "quantize", "-m", "fashion-dit-small", "-c", "Int4", "--samples", 0, "--plan", "-o", tmp_path / "no"
    )
    assert code == 0
    assert "transformer_blocks.0.ff.net.2" in out
    assert "int4:g64" in out
    assert not (tmp_path / "no").exists()


def test_a_saved_plan_is_a_config(tmp_path, capsys):
    plan = quant.W4A8().plan(pipelines.load("fashion-dit-small").transformer)
    plan.save(tmp_path / "plan.json")
    arguments = ("-m", "fashion-dit-small", "-c", tmp_path / "plan.json", "--samples", 0, "-o", tmp_path / "out",
                 "--rest", "int8")  # fmt: skip
    assert run(capsys, "quantize", *arguments)[0] == 0
    assert json.loads((tmp_path / "out" / "quantized.json").read_text())["plan"]["layers"] == plan.to_json()["layers"]
    assert json.loads((tmp_path / "out" / "quantized.json").read_text())["eight"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-c", "Int9"), "unknown config 'Int9'; did you mean"),
        (("-c", "Int8(bits=4)"), "cannot be made: "),
        (("-c", "nowhere.json"), "nowhere.json does not exist"),
        (("-c", "AdaQuant", "--samples", "0"), "give calibration, see quant.record"),
        (("--steps", "0"), "give at least 0 and 1"),
        (("--rest", "int4"), "unknown rest 'int4'"),
    ],
)
def test_mistakes_are_one_line(arguments, says, tmp_path, capsys):
    code, _, err = run(capsys, "quantize", "-m", "fashion-dit-small", "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_doctor_lists_the_backends(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for backend in ("onednn", "triton", "torch", "cuda", "reference", "torchao"):
        assert f"quant {backend} on cpu" in out
