"""What an import costs, which names there are, and that nobody imports a room by its folder's name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fewstep

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("samplers", "caching", "quant", "pipelines", "eval")
HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy", "matplotlib", "torchmetrics", "accelerate")

PUBLIC = {
    "samplers": (
        "DPMSolverSinglestep DPMSolverSDE IPNDM LMS RungeKutta FlowSolver FlowTurbo NeuralSolver sample_adaptive "
        "DPMSolverSinglestepScheduler IPNDMScheduler LMSScheduler RungeKuttaScheduler FlowScheduler "
        "NoiseSchedule Grid SolverPlan Solver DDIM DPMSolver DEIS UniPC lagrange_row sample Executor Run "
        "DDIMScheduler DPMSolverScheduler DEISScheduler UniPCScheduler PlanScheduler "
        "Restart RestartInterval MeanReverting ResShift LML RestartScheduler MeanRevertingScheduler LMLScheduler "
        "SASolver SASolverScheduler "
        "skip_tuning_ remove_skip_tuning_ skip_tuned "
        "HeavyBall GHVB DCSolver EMS ModelStatistics USF Decision AcceleratedDDIM AcceleratedDDPM "
        "HeavyBallScheduler GHVBScheduler DCSolverScheduler EMSScheduler USFScheduler "
        "TimeShift averaged_time_shift analytic_first_step scaled_noise to_zero "
        "BrownianPath ParallelResult sample_parallel FirstHitting "
        "make_scheduler parse_spec scheduler_names "
        "NoiseSource DynamicThreshold LinearMultistep load_ratios save_ratios learn"
    ),
    "caching": (
        "FirstBlockCache DBCache TeaCache fit_polynomial PolynomialFit MagCache TaylorSeer PyramidBroadcast FasterCache "
        "StepRehash EarlyExit train_early_exit_ Scale profile EasyCache HiCache Hermite "
        "UncondReuse GuidanceWindow CFGCache FasterCacheCFG FrequencyDelta FasterCacheDelta TokenMerging FrameMerging "
        "ReAttention search_attention Removal removable removal_scores prior_noise"
    ),
    "quant": (
        "quantize_ dequantize_ save load_ record allocate_bits plan_of kernels QuantPlan LayerPlan QuantReport Format "
        "Quantized QuantLinear QuantConv2d Call Int8 Int4 W4A8 FP8 FP4 Binary MixedPrecision SVDQuant MixDQ FPQuant AdaQuant "
        "AdaLog FP6 GPTQ TFMQ EfficientDM QuEST BinaryDM BitsFusion Correction fit_correction correct_ fit_cache "
        "fold_smoothing_ unfold_smoothing_ AttentionPlan to_torchao save_nunchaku_lite"
    ),
    "pipelines": (
        "load models edit generate_parallel guided_denoiser ParallelImages generate_propagated StitchedDenoiser Leap "
        "bottleneck Stage Recipe apply_ applied remove_ tune"
    ),
    "eval": (
        "fid clip_score cost Sweep report Moments Score fidelity Fidelity compare seed_blocks capture_latents "
        "compare_clock macs fid_infinity sfid kid cmmd prdc inception_score sliced_wasserstein measure_images FeatureSet "
        "Transform best status compare_sweeps check_reference"
    ),
}
"""Names that users rely on: taking one away is a breaking change, and this list is where it shows."""


def heavy_modules_after(code: str) -> list[str]:
    """Which of the heavy modules a fresh interpreter has loaded after ``code``."""
    code = f"{code}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import fewstep",
        "import fewstep; fewstep.__version__; dir(fewstep)",
        "from fewstep import pipelines, eval; dir(pipelines); dir(eval)",
        "from fewstep import cli; assert cli.run(['--help']) == 0",
        "from fewstep import cli; assert cli.run(['sweep', '--help']) == 0",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code):
    assert heavy_modules_after(code) == []


def test_plans_and_solvers_cost_torch_but_not_diffusers():
    loaded = heavy_modules_after("from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, sample")
    assert not {"diffusers", "transformers", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_an_attribute_of_the_package(room):
    assert getattr(fewstep, room) is importlib.import_module(f"fewstep.{room}")
    assert room in dir(fewstep)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_resolve(room):
    module = importlib.import_module(f"fewstep.{room}")
    listed = dir(module)
    for name in PUBLIC[room].split():
        assert getattr(module, name) is not None
        assert name in listed
    for name in listed:
        getattr(module, name)


@pytest.mark.parametrize(
    "module", ["fewstep", "fewstep.samplers", "fewstep.quant", "fewstep.pipelines", "fewstep.eval"]
)
def test_an_unknown_name_is_answered_with_the_known_ones(module):
    there = importlib.import_module(module)
    with pytest.raises(AttributeError, match=f"'{module}' has no attribute 'smaplers'") as error:
        there.smaplers  # noqa: B018
    assert "has" in str(error.value).partition("smaplers")[2]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imported_by_its_folder_name_says_what_to_import_instead(room):
    """In the repository's root the folders lie on ``sys.path``: a second copy of every class must not come to be."""
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import fewstep.{room} instead" in done.stderr
