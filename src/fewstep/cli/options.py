"""The commands' options by what they are about: how each is spelled and what --help says. Defaults stand in the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

FAILED = 1
"""The exit code where cells of a sweep failed or the disk did."""

# -- which model, and where it runs -----------------------------------------------------------------------------------
Model = Annotated[
    str, Option("--model", "-m", help="An embedded model (`fewstep models`), or the folder of a saved pipeline.")
]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1 or mps; the accelerator where there is one.")]

# -- what is drawn ----------------------------------------------------------------------------------------------------
Seed = Annotated[int, Option("--seed", "-s", help="The first seed; image i has seed SEED + i.")]
Prompt = Annotated[
    list[str] | None,
    Option(
        "--prompt",
        "-p",
        help="What to draw, a class's name where the model draws classes, nothing where it takes neither; "
        "repeat it to cycle.",
    ),
]
Picture = Annotated[Path, Option("--out", "-o", help="The PNG to write.")]
Scheduler = Annotated[str | None, Option(help="A scheduler, such as 'DPMSolver(solver_order=3)'.  [DPMSolver]")]
Steps = Annotated[int | None, Option(help="Number of steps.  [10]")]
Guidance = Annotated[
    float | None, Option("--guidance", "-g", help="Classifier-free guidance scale; at most 1 is without.  [4]")
]
UsedRecipe = Annotated[
    Path | None, Option(help="A recipe (`fewstep tune --recipe`) in place of scheduler, steps and guidance.")
]
Images = Annotated[int, Option("--n", "-n", help="How many images.")]

# -- a sweep's axes ---------------------------------------------------------------------------------------------------
_SPECS = "Comma-separated or repeated"

Schedulers = Annotated[
    list[str] | None,
    Option(
        "--schedulers", "--scheduler", help=f"{_SPECS}; 'diffusers:Name' is diffusers' own. Options go in parentheses."
    ),
]
NumbersOfSteps = Annotated[str | None, Option(help="Comma-separated, such as 5,8,10,20.")]
Models = Annotated[
    list[str] | None,
    Option(
        "--model",
        "-m",
        help=f"{_SPECS}: embedded models (`fewstep models`), folders of saved pipelines.  \\[fashion-sd]",
    ),
]
Grids = Annotated[list[str] | None, Option(help=f"{_SPECS}: karras, ays, ...  \\[default]")]
Guidances = Annotated[
    str | None,
    Option(
        "--guidance",
        "-g",
        help="Classifier-free guidance scale, or several, comma-separated; at most 1 is without.  [4]",
    ),
]
Caches = Annotated[list[str] | None, Option(help=f"{_SPECS}.  \\[none]")]
Quants = Annotated[list[str] | None, Option(help=f"{_SPECS}.  \\[none]")]

# -- a sweep's samples and metrics ------------------------------------------------------------------------------------
Metrics = Annotated[list[str] | None, Option(help=f"{_SPECS}; what fits the model where left out.")]
Fidelity = Annotated[
    str | None,
    Option(
        help="Hold each image against a reference of its seed: 'same' for its own scheduler without cache and "
        "quantisation, or such as 'DDIM@100', DDIM at 100 steps.",
    ),
]
Samples = Annotated[int | None, Option("--samples", "-n", help="Images a cell.  [1000]")]
Blocks = Annotated[int | None, Option(help="Blocks of seeds, each a cell of its own.  [1]")]
FirstSeed = Annotated[int | None, Option("--seed", "-s", help="The first seed; image i has seed SEED + i.  [0]")]
BatchSize = Annotated[int | None, Option(help="Images drawn at once.  [50]")]
Limit = Annotated[int | None, Option(help="At most so many images a cell, to try it out.")]

# -- how a sweep is run, and what becomes of it -----------------------------------------------------------------------
SweepFile = Annotated[
    Path | None, Argument(metavar="[SWEEP.toml]", help="Describes the sweep; options go over what it says.")
]
SweepFolder = Annotated[Path | None, Option("--out", "-o", help="Folder for images and results; a run there goes on.")]
Trackers = Annotated[
    list[str] | None,
    Option("--tracker", help=f"{_SPECS}: tensorboard, wandb, ... gets each finished cell's numbers."),
]
Ray = Annotated[str | None, Option(help="Run the cells on Ray: 'local', 'auto', or the address of a cluster.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what it would cost; draw and write nothing.")]
Finished = Annotated[Path, Argument(metavar="DIR", help="The --out folder of a sweep.")]

# -- what is tuned, and for what --------------------------------------------------------------------------------------
TuneSampler = Annotated[bool, Option("--sampler", help="Learn a sampler: a plan of few calls for this model.")]
TuneRecipe = Annotated[
    bool,
    Option("--recipe", help="Search sampler, cache and quantisation together, for a --quality or a --budget."),
]
NFE = Annotated[int, Option(help="Network calls an image, with --sampler.")]
Quality = Annotated[
    float | None, Option(help="With --recipe: the largest RMS error of the latents; least work is sought.")
]
Budget = Annotated[
    float | None, Option(help="With --recipe: the most work, in calls of the network; least error is sought.")
]
Calls = Annotated[str, Option(help="With --recipe: numbers of network calls to learn samplers for, comma-separated.")]
LearnedGuidance = Annotated[
    list[float] | None,
    Option("--guidance", "-g", help="Guidance to learn for; repeat it for a plan that serves several.  [4]"),
]
Tuned = Annotated[Path, Option("--out", "-o", help="The plan's or recipe's JSON file; arrays lie beside it.")]
Plot = Annotated[Path | None, Option(help="A PNG of the loss and the learned grid.  [OUT with .png]")]

# -- what tuning learns from ------------------------------------------------------------------------------------------
Prompts = Annotated[Path | None, Option(help="A text file, a prompt a line; the embedded model's own if left out.")]
Minutes = Annotated[float, Option(help="How long to learn, after the teacher.")]
Trajectories = Annotated[int, Option(help="How many trajectories; a third of them is only judged by.")]
TeacherSteps = Annotated[int, Option(help="Steps of the teacher.")]
Work = Annotated[Path | None, Option(help="Keep the teacher's trajectories here; a stopped run goes on from them.")]

# -- quantisation and what it calibrates with -------------------------------------------------------------------------
QuantFolder = Annotated[
    Path | None, Option("--out", "-o", help="The folder for the quantised network; not needed with --plan.")
]
Method = Annotated[
    str,
    Option("--config", "-c", help="A method, such as 'Int8' or 'SVDQuant(rank=16)', or the path of a saved plan."),
]
CalibrationPrompt = Annotated[
    list[str] | None, Option("--prompt", "-p", help="A prompt to calibrate with; repeat it for more.")
]
CalibrationSteps = Annotated[int, Option(help="Steps of the trajectory that calibration follows.")]
CalibrationSamples = Annotated[int, Option("--samples", "-n", help="Images drawn for calibration; 0 for none.")]
CalibrationGuidance = Annotated[float, Option("--guidance", "-g", help="Classifier-free guidance scale.")]
Rows = Annotated[int, Option(help="Rows of each layer's inputs that calibration looks at.")]
Resume = Annotated[
    Path | None,
    Option(help="A folder that keeps finished layers, so that the same command goes on from there."),
]
Rest = Annotated[str, Option(help="How the file stores what is not quantised: exact, float16, or int8.")]
PlanOnly = Annotated[bool, Option("--plan", help="Print the plan and write nothing.")]
