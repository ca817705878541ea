"""``fewstep tune``: what its help promises, without the minutes that it takes."""

import pytest

from fewstep import cli, pipelines
from fewstep.errors import FewstepError
from fewstep.samplers import learn


@pytest.mark.parametrize(("model", "given", "guidance"), [
    ("fashion-dit-small", (), 4.0), ("fashion-dit-small", ("-g", "2.5"), 2.5), ("fashion-pixel", (), 1.0),
])  # fmt: skip
def test_a_recipe_is_tuned_at_the_guidance_that_help_says(monkeypatch, tmp_path, capsys, model, given, guidance):
    asked = {}

    def tune(pipe, prompts, **options):
        asked.update(options)
        raise FewstepError("enough was seen")

    monkeypatch.setattr(pipelines, "tune", tune)
    command = ["tune", "--recipe", "--budget", "4", "--device", "cpu", "-m", model, "-o", str(tmp_path / "r.json")]
    assert cli.run([*command, *given]) == 2
    assert "enough was seen" in capsys.readouterr().err
    assert asked["guidance"] == guidance


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_the_minutes_of_learning(monkeypatch, tmp_path, capsys, option):
    (tmp_path / "taken").write_text("a file where a folder belongs")
    monkeypatch.setattr(learn, "Teacher", lambda *given, **options: pytest.fail("it began to learn"))
    paths = {"--out": "plan.json", "--plot": "plan.png", option: "taken/plan.json"}
    command = ["tune", "--sampler", "--device", "cpu", "-m", "fashion-dit-small"]
    assert cli.run([*command, *(part for name, path in paths.items() for part in (name, str(tmp_path / path)))]) == 2
    assert "taken" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_help_shows_every_default_in_brackets(capsys, monkeypatch):
    """Where a bracket begins with a small letter it is markup, unless it is escaped."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = {}
    for command in ("sweep", "generate", "tune", "quantize"):
        assert cli.run([command, "--help"]) == 0
        shown[command] = capsys.readouterr().out
    for text in ("[fashion-sd]", "[default]", "[none]", "[4]", "[1000]", "[50]"):
        assert text in shown["sweep"]
    assert "[DPMSolver]" in shown["generate"]
    assert "[OUT with .png]" in shown["tune"]
    assert not any("\\[" in text for text in shown.values())
