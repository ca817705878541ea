"""MixDQ: bits by sensitivity, with layers that change the content and layers that change the quality kept apart.

Source: MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision Quantization,
2405.17873.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.allocation import damage as damages
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, SKIPPED, Method
from fewstep.quant.methods.gptq import chosen
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site

CONTENT = ("cross", "feedforward")
"""Roles whose error changes what is drawn; that of the others changes how well (sec. 4.2)."""


@dataclass(frozen=True)
class MixDQ(Method):
    """Weights of 2, 4 and 8 bits by two integer programs, one for each group, over a scan of how they share the budget.

    The finalists are compared by the error of the whole network on the calibration calls, and the best is taken. Keys and
    values of the text have their first token, which is the same for all prompts, computed once and kept out of
    quantisation.

    Attributes:
        budget: mean bits a weight, scales included.
        content: choices for attention to the text and feed-forward layers.
        quality: choices for the rest.
        splits: how many shares of the budget are tried.
        finalists: how many of them are compared as whole networks; those with the least predicted damage.
        gptq: whether codes are chosen by GPTQ once the formats are.
        first_token: whether constant first tokens are kept out.
        keep: roles and names that stay as they are.
    """

    budget: float = 5.0
    content: tuple[str, ...] = ("int2:g64 x int8:row", "int4:g64 x int8:row", "int8:row x int8:row")
    quality: tuple[str, ...] = ("int4:g64 x int8:row", "int8:row x int8:row")
    splits: int = 10
    finalists: int = 4
    gptq: bool = False
    first_token: bool = True
    keep: tuple[str, ...] = field(default=SKIPPED)

    def reads(self, site: Site) -> bool:
        return site.role == "cross" or (self.gptq and site.role not in FLAT)

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        from fewstep.quant.allocation.allocate import output_noise, prepare, tabulated, with_provenance
        from fewstep.quant.allocation.options import chosen_plan, mean_bits
        from fewstep.quant.allocation.solve import integer_program

        if not calls:
            raise FewstepError("MixDQ measures sensitivities; give calibration, see quant.record")
        base, open_sites, options = prepare(model, self.content, self.keep)
        narrow = prepare(model, self.quality, self.keep)[2]
        options |= {site.name: narrow[site.name] for site in open_sites if site.role not in CONTENT}

        def metric(site: Site) -> damages.Metric:
            return damages.dissimilarity if site.role in CONTENT else damages.noise

        table = tabulated(base, options, damages.measured(model, open_sites, options, calls, metric))
        groups = [
            {s.name: table[s.name] for s in open_sites if (s.role in CONTENT) == inside} for inside in (True, False)
        ]  # fmt: skip
        sizes = {name: base.numel(name) for name in table}
        weights = [sum(sizes[name] for name in group) for group in groups]
        if not all(weights):  # one group alone has nothing to share with
            groups, weights = [table], [sum(weights)]
        ratio = weights[0] / weights[1] if len(weights) == 2 else 0.0
        found: list[tuple[float, dict[str, int]]] = []
        for k in np.linspace(0.46, 1.36, self.splits) if len(groups) == 2 else (1.0,):
            rest = self.budget * (1 + ratio) / (k * ratio + 1)
            shares = (k * rest, rest) if len(groups) == 2 else (self.budget,)
            choice: dict[str, int] = {}
            try:
                for group, share in zip(groups, shares, strict=True):
                    choice |= integer_program(group, sizes, float(share))
            except FewstepError:
                continue  # this share is below what the group's narrowest formats need
            if all(choice != other for _, other in found):
                found.append((sum(table[n][i].damage for n, i in choice.items()), choice))
        if not found:
            least = sum(min(o.bits for o in table[n]) * sizes[n] for n in table) / sum(sizes.values())
            raise FewstepError(
                f"no share of {self.budget:g} bits a weight serves both groups; at least {least:.3f} are needed"
            )
        found.sort(key=lambda entry: entry[0])
        # Damages of two metrics do not compare, so the network as a whole decides among the best of each share.
        finals = [choice for _, choice in _spread(found, self.finalists)]
        plans = [chosen_plan(base, table, choice, "MixDQ") for choice in finals]
        scores = [output_noise(model, plan, calls) for plan in plans] if len(plans) > 1 else [0.0]
        best = min(range(len(plans)), key=lambda i: scores[i])
        settings = {
            **self.settings(),
            "finalists_noise": scores,
            "finalists_bits": [mean_bits(base, table, c) for c in finals],
        }
        plan = with_provenance(plans[best], base, table, finals[best], settings)
        return plan.with_layers(self._first_tokens(plan, open_sites, calls))

    def _first_tokens(
        self, plan: QuantPlan, open_sites: Sequence[Site], calls: Sequence[Call]
    ) -> dict[str, LayerPlan | None]:
        if not self.first_token or not constant_first_token(calls):
            return {}
        return {
            site.name: replace(plan.layers[site.name], first_token=True)
            for site in open_sites
            if site.role == "cross" and site.name.endswith(("to_k", "to_v")) and plan.layers[site.name].activation
        }

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        codes = chosen(site, plan, inputs) if self.gptq and site.role not in FLAT else None
        if not plan.first_token:
            return layer_arrays(site.module, plan, quantized=codes)
        if inputs is None or inputs.first is None:
            raise FewstepError(
                f"{site.name} has a first token that is not the same in all calls; give first_token=False"
            )
        first = site.module(inputs.first.to(site.weight))
        return layer_arrays(site.module, plan, quantized=codes, extra={"first": first.detach()})


def constant_first_token(calls: Sequence[Call]) -> bool:
    """Whether the text's first token has one embedding in all samples of all calls, as CLIP's start of text has."""
    seen = [c.kwargs.get("encoder_hidden_states", c.args[2] if len(c.args) > 2 else None) for c in calls]
    if not all(isinstance(s, Tensor) and s.ndim == 3 for s in seen):
        return False
    first = torch.cat([s[:, 0] for s in seen])
    # The text encoder's rounding may differ between batches: a millionth of the embedding's own size.
    return bool((first - first[0]).abs().max() <= 1e-6 * first[0].abs().max())


def _spread(found: Sequence[tuple[float, dict[str, int]]], count: int) -> list[tuple[float, dict[str, int]]]:
    """``count`` of the candidates, evenly from the best to the worst."""
    if len(found) <= count:
        return list(found)
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)] if count > 1 else [found[0]]
