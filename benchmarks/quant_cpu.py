"""int8 on the CPU against float32, end to end: DiT-XL/2 and a UNet of Stable Diffusion 1.5's size, random weights.

    python benchmarks/quant_cpu.py [--models dit unet] [--repeats 5] [--threads 1] [--peers] [--arms NAME ...]

Times are of one network call; the arms take turns, and a ratio is the median of the ratios of neighbouring calls, so that a
load that comes and goes meets all of them. The error is ||y_q - y|| / ||y|| of the network's output. With random weights a
network's output says how far it moved, not whether an image is good: for that see quant_quality.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, machine, provenance, table, write
from torch import Tensor, nn

from fewstep import quant
from fewstep.quant.calibration.calls import Call, first_tensor

Network = tuple[nn.Module, Call, str]


def _dit(heads: int, width: int, blocks: int, size: int, labels: list[int]) -> tuple[nn.Module, Call]:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width, num_layers=blocks, sample_size=size, out_channels=8
    )
    batch = len(labels)
    call = Call((), {"hidden_states": torch.randn(batch, 4, size, size), "timestep": torch.full((batch,), 500),
                     "class_labels": torch.tensor(labels)})  # fmt: skip
    return model.eval(), call


def _unet(size: int, context: int, **options: Any) -> tuple[nn.Module, Call]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=size, cross_attention_dim=context, attention_head_dim=8, **options)
    call = Call((), {"sample": torch.randn(1, 4, size, size), "timestep": torch.tensor(500),
                     "encoder_hidden_states": torch.randn(1, 77, context)})  # fmt: skip
    return model.eval(), call


def dit() -> Network:
    """DiT-XL/2 at 256 x 256 pixels: 28 blocks of width 1152, 256 tokens, one guided image (a batch of 2)."""
    return *_dit(16, 72, 28, 32, [1, 1000]), "DiT-XL/2, 2 x 256 tokens"


def dit_long() -> Network:
    """DiT-XL/2 at 512 x 512 pixels, 4 of its 28 blocks: 1024 tokens, where attention weighs more."""
    return *_dit(16, 72, 4, 64, [1]), "DiT-XL/2, 4 blocks, 1024 tokens"


def unet() -> Network:
    """Stable Diffusion 1.5's UNet at 512 x 512 pixels, one image."""
    return *_unet(64, 768), "UNet of SD 1.5, 64 x 64 latent"


def small_unet() -> Network:
    """A UNet of Stable Diffusion 1.5's structure with 96 to 384 channels, 32 x 32 latent: to try things out."""
    return *_unet(32, 256, block_out_channels=(96, 192, 384, 384)), "small UNet, 32 x 32 latent"


def small_dit() -> Network:
    """Two blocks of DiT's structure of width 384, 64 tokens: to try things out."""
    return *_dit(6, 64, 2, 16, [1]), "small DiT, 64 tokens"


MODELS: dict[str, Callable[[], Network]] = {"dit": dit, "dit-long": dit_long, "unet": unet}
SMALL: dict[str, Callable[[], Network]] = {"small-unet": small_unet, "small-dit": small_dit}

Arm = Callable[[nn.Module, Call], None]


def torchao(config: str) -> Arm:
    """torchao on the linear layers that ``Int8`` takes: it has no convolution on the CPU."""

    def apply(model: nn.Module, call: Call) -> None:
        import torchao.quantization as ao  # pyright: ignore[reportMissingImports]

        chosen = set(quant.Int8().plan(model).layers)
        ao.quantize_(model, getattr(ao, config)(), lambda m, name: type(m) is nn.Linear and name in chosen)

    return apply


def sdnq(**options: Any) -> Arm:
    """SDNQ with its own choice of layers, convolutions too."""

    def apply(model: nn.Module, call: Call) -> None:
        from sdnq import sdnq_post_load_quant  # pyright: ignore[reportMissingImports]

        sdnq_post_load_quant(model, weights_dtype="int8", quant_conv=True, torch_dtype=torch.float32, **options)

    return apply


def bfloat16(model: nn.Module, call: Call) -> None:
    model.to(torch.bfloat16)


def ours(**options: Any) -> Arm:
    def apply(model: nn.Module, call: Call) -> None:
        report = quant.quantize_(
            model, quant.Int8(**options), [call] if "error" in options else None, keep_originals=False
        )
        share = report.plan.provenance.get("float_multiplications")
        if share is not None:
            print(
                f"{share:.1%} of the multiplications stay in float32, calibrated in {report.seconds:.0f} s", flush=True
            )

    return apply


ARMS: dict[str, Arm] = {
    "fewstep int8": ours(weight="int8:row"),
    "fewstep int8, 7-bit weights": ours(weight="int7:row"),
    "fewstep int8, error within 1 %": ours(error=0.01),
}
PEERS: dict[str, Arm] = {
    "bfloat16": bfloat16,
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "SDNQ int8 products": sdnq(use_quantized_matmul=True, use_quantized_matmul_conv=True),
    "SDNQ int8 weights": sdnq(),
}


def timed(model: nn.Module, call: Call) -> tuple[float, Tensor]:
    like = next(p for p in model.parameters() if p.is_floating_point() and p.numel() > 1)
    dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
    kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call.kwargs.items()}
    with torch.no_grad():
        start = time.perf_counter()
        out = first_tensor(model(**kwargs))
        return time.perf_counter() - start, out.float()


def measure(make: Callable[[], Network], arms: dict[str, Arm], repeats: int) -> Iterator[dict[str, Any]]:
    """Each arm against float32 in turns. One arm at a time: three networks of this size need not fit at once."""
    reference, call, title = make()
    for name, apply in arms.items():
        row: dict[str, Any] = {"model": title, "about": make.__doc__, "arm": name}
        model = make()[0]
        try:
            apply(model, call)
            _, got = timed(model, call)
        except Exception as error:
            yield {**row, "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            continue
        _, want = timed(reference, call)
        base, fast = [], []
        for _ in range(repeats):
            base.append(timed(reference, call)[0])
            fast.append(timed(model, call)[0])
            if fast[-1] > 60:
                break  # slower than anybody would wait for; one pair says it
        ratios = sorted(b / f for b, f in zip(base, fast, strict=True))
        yield {
            **row, "float32_s": statistics.median(base), "arm_s": statistics.median(fast),
            "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1], "pairs": len(ratios),
            "error": float((got - want).norm() / want.norm()),
        }  # fmt: skip
        del model


def page(rows: list[dict[str, Any]], about: dict[str, Any], threads: int) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        if "failed" in row:
            return [row["model"], row["arm"], "–", "–", row["failed"], "–"]
        spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}, {row['pairs']} pairs)"
        return [
            row["model"],
            row["arm"],
            f"{row['float32_s']:.2f}",
            f"{row['arm_s']:.2f}",
            spread,
            f"{row['error']:.2%}",
        ]

    head = ("model", "arm", "float32 s", "arm s", "times as fast", "output error")
    isa = torch.backends.cpu.get_cpu_capability() + (" with VNNI" if torch.cpu._is_vnni_supported() else "")
    return (
        "# int8 on the CPU\n\nOne network call, random weights, arms in turns; ratios are medians of neighbouring calls.\n"
        f"{threads} thread(s), {isa}.\n\n" + table(head, [cells(row) for row in rows]) + "\n" + provenance(about)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *SMALL], default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action="store_true", help="also bfloat16, torchao and SDNQ")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *PEERS], help="these only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    rows: list[dict[str, Any]] = []
    kept = options.out / "quant_cpu.json"
    if kept.exists() and (before := json.loads(kept.read_text()))["threads"] == options.threads:
        rows = before["rows"]
    arms = ARMS | (PEERS if options.peers else {})
    if options.arms:
        arms = {name: (ARMS | PEERS)[name] for name in options.arms}
    for name in options.models:
        for row in measure((MODELS | SMALL)[name], arms, options.repeats):
            print(row, flush=True)
            same = [r for r in rows if (r["about"], r["arm"]) == (row["about"], row["arm"])]
            rows = [r for r in rows if r not in same] + [row]  # what is measured again is replaced
            rows.sort(key=lambda r: r["model"])
            found = {**about, "threads": options.threads, "rows": rows}
            write(options.out, "quant_cpu", found, page(rows, about, options.threads))


if __name__ == "__main__":
    main()
