"""The tables and the picture of the comparison of caches, from its JSON files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from caching_arms import curve, is_share, kind
from record import provenance, table

from fewstep.artifact import write_bytes

PLAN = "plan 50"
"""The arm that others are held against: calibrated to half the MACs."""


def at_equal_macs(entries: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Of every method its error at our plan's MACs: (method, MACs that it is read at, error).

    Between two settings on the method's own front the logarithm of the error is taken to be linear in the MACs. Where all
    settings take more, or all less, the nearest one's error stands, and its MACs are said.
    """
    done = {e["arm"]: e for e in entries if "macs" in e and "+" not in e["arm"]}
    if PLAN not in done:
        return []
    wanted = done[PLAN]["macs"]
    found = []
    for name in dict.fromkeys(map(curve, done)):
        points = sorted((e["macs"], e["latent_rms"]) for e in done.values() if curve(e["arm"]) == name)
        front = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
        x, y = np.array([p[0] for p in front]), np.log(np.maximum([p[1] for p in front], 1e-12))
        if is_share(name):
            continue
        at = float(np.clip(wanted, x.min(), x.max()))
        found.append((name, at, float(np.exp(np.interp(at, x, y)))))
    return sorted(found, key=lambda f: f[2])


def page(body: dict[str, Any]) -> str:
    entries = [e for e in body["arms"] if "macs" in e]
    rows = [
        [
            f"{e['arm']}", f"{e['macs']:.1%}", f"{e['cpu_time']:.0%}", f"{e['latent_rms']:.4f}", f"{e['latent_rms_worst']:.4f}",
            f"{e['psnr']:.1f}",
        ]
        for e in sorted(entries, key=lambda e: e["macs"])
    ]  # fmt: skip
    header = ["arm", "MACs", "CPU time", "latent RMS", "worst", "PSNR, dB"]
    text = f"# Caches on {body['model']}, {body['steps']} steps\n\n{table(header, rows)}\n"
    text += (
        f"{body['seeds']} seeds, guidance {body['guidance']:g}, DPM-Solver++ 2M; errors against the same seeds without a cache. "
        "MACs are executed ones. CPU time is of the whole pipeline on one thread, decoder included; small networks spend much "
        "of it outside of what MACs count.\n\n"
    )
    if equal := at_equal_macs(entries):
        ours_ = next(e for e in entries if e["arm"] == PLAN)
        rows = [[n, f"{at:.1%}", f"{error:.4f}", f"{error / ours_['latent_rms']:.2f}"] for n, at, error in equal]
        text += (
            f"## At the MACs of our calibrated plan\n\nThe plan takes {ours_['macs']:.1%} and errs by {ours_['latent_rms']:.4f}. "
            "The others' errors are interpolated between their best settings; where these do not reach that far, the nearest "
            f"one's error stands, at the MACs said.\n\n{table(['method', 'MACs', 'latent RMS', 'times the plan’s'], rows)}\n"
        )
    if body.get("distribution"):
        share = {e["arm"]: f"{e['macs']:.1%}" for e in entries}
        rows = [
            [
                d["arm"], share.get(d["arm"], "100%"), f"{d['fid']:.3f}",
                f"{d['fid_rise']:+.1%} ({d['fid_rise_low']:+.1%} to {d['fid_rise_high']:+.1%})" if "fid_rise" in d else "",
                f"{d['accuracy']:.1f} %" if "accuracy" in d else "",
            ]
            for d in body["distribution"]
        ]  # fmt: skip
        text += (
            f"## FID\n\n{table(['arm', 'MACs', 'FID', 'rise', 'class accuracy'], rows)}\n{body['images']} images an arm, "
            "the same seeds; the rise is of the FID without a cache, its 95 % interval from a paired jackknife over 20 blocks of "
            "seeds. FID falls with the number of images, so that a rise is a smaller share of it here than with more images.\n\n"
        )
    failed = [e for e in body["arms"] if "failed" in e]
    if failed:
        text += "## What did not run\n\n" + "".join(f"- {e['arm']}: {e['failed']}\n" for e in failed) + "\n"
    return text + provenance(body["machine"])


def is_plan(name: str) -> bool:
    """Whether an arm is a plan file by itself."""
    return name.startswith("plan") and "+" not in name


def picture(out: Path) -> None:
    """Error against MACs of all models measured so far: a column a model, a row a number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bodies = [json.loads(path.read_text()) for path in sorted(out.glob("fashion-*.json"))]
    models = list(dict.fromkeys(body["model"] for body in bodies))
    steps = sorted({body["steps"] for body in bodies})
    colours = {"fewstep": "#9aa0a6", "DeepCache 0.1.1": "#d1495b", "diffusers": "#edae49", "cache-dit": "#66a182"}
    figure, axes = plt.subplots(
        len(steps), len(models), figsize=(3.2 * len(models), 3.1 * len(steps) + 0.4),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_visible(False)
    for body in bodies:
        axis = axes[steps.index(body["steps"]), models.index(body["model"])]
        axis.set_visible(True)
        entries = [e for e in body["arms"] if e.get("latent_rms", 0) > 0]
        for name, colour in colours.items():
            own = [e for e in entries if kind(e["arm"]) == name and not is_plan(e["arm"])]
            axis.scatter([e["macs"] for e in own], [e["latent_rms"] for e in own], s=14, c=colour, label=name)
        own = [e for e in entries if is_plan(e["arm"])]
        axis.scatter(
            [e["macs"] for e in own], [e["latent_rms"] for e in own], s=70, marker="*", c="#00798c",
            label="fewstep, calibrated plans",
        )  # fmt: skip
        axis.set(title=f"{body['model']}, {body['steps']} steps", yscale="log")
        axis.grid(alpha=0.25)
    figure.supxlabel("executed MACs, share of all")
    figure.supylabel("latent RMS error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(out / "pareto.png", buffer.getvalue())
