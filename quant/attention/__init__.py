"""Attention in 8 bits: Q K^T of smoothed keys in int8 or FP8, P V in float16 or FP8.

By a plain reference, a Triton kernel, or the attention backends that diffusers has.
"""

from fewstep.quant.attention.plan import AttentionPlan as AttentionPlan
from fewstep.quant.attention.reference import quantized_attention as quantized_attention
