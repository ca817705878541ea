"""Tiny random instances of the real classes, made from seeds: a Stable Diffusion pipeline, a CLIP, a feature net.

Run as a program it is a sweep that kills itself: ``python eval_fixtures.py OUT call 10`` at its 10th network call,
``python eval_fixtures.py OUT rename 4`` when its 4th file of images is written but not yet in its place.
"""

import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROMPTS = ("a dark t-shirt", "a bright ankle boot", "a dress", "a shirt", "a wide bag")
SCHEDULERS = ("diffusers:DDIMScheduler", "diffusers:HeunDiscreteScheduler")


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer that knows single characters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "th", "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\nt h\n")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 24})
        )
        return CLIPTokenizer.from_pretrained(folder)


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def quiet(pipe: Any) -> Any:
    """The pipeline, without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(**options: Any) -> Any:
    """UNet2DConditionModel of two levels and 8 x 8 samples, with attention at the lower one unless the options say else."""
    from diffusers import UNet2DConditionModel

    given: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**given, **options}).eval()


def tiny_vae(channels: int = 3, widths: tuple[int, ...] = (4, 8), **options: Any) -> Any:
    """AutoencoderKL that halves images once for every width after the first."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **options,
    ).eval()


def tiny_pipeline(seed: int = 0) -> Any:
    """A StableDiffusionPipeline of 1-channel 32 x 32 images with random weights: equal seeds, equal weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet(cross_attention_dim=32)
        vae = tiny_vae(1, (4, 8, 8))
        text_encoder = CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer)))
    return quiet(
        StableDiffusionPipeline(
            vae=vae,
            unet=unet,
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_dit(seed: int = 0) -> Any:
    """A DiTPipeline of 1-channel 16 x 16 images that knows the classes 0 "dress" (also "a dress") and 1 "bag"."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            norm_num_groups=4,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=1000,  # the pipeline's "no class" is 1000
        )
        vae = tiny_vae(1, (4, 8, 8))
        for parameter in transformer.parameters():  # its last layer starts at zero, which no class would change
            nn.init.normal_(parameter, std=0.2)
    labels: Any = {0: "dress, a dress", 1: "bag"}
    return quiet(DiTPipeline(transformer.eval(), vae, DDIMScheduler(clip_sample=False), id2label=labels))


def tiny_unconditional(kind: str = "DDPMPipeline", seed: int = 0) -> Any:
    """A DDPMPipeline or DDIMPipeline of 1-channel 16 x 16 images: no prompts, no guidance."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    return quiet(getattr(diffusers, kind)(unet.eval(), diffusers.DDPMScheduler()))


def tiny_sd3(seed: int = 0) -> Any:
    """A StableDiffusion3Pipeline of 1-channel 16 x 16 images without its third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoders = [
            CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(tokenizer), projection_dim=16)).eval()
            for _ in range(2)
        ]
        transformer = SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=4,
        )
        vae = tiny_vae(1, (4, 8, 8), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0)
    return quiet(
        StableDiffusion3Pipeline(
            transformer.eval(), FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1],
            tokenizer, None, None,
        )
    )  # fmt: skip


def tiny_clip(seed: int = 0) -> tuple[Any, Any]:
    """A CLIPModel with random weights and its CLIPProcessor, for 32 x 32 images."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(text_config=_text_config(tokenizer), vision_config=vision, projection_dim=16)
        ).eval()
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def tiny_features(dim: int = 6, channels: int = 1, seed: int = 0) -> nn.Module:
    """A random convolution to (n, ``dim``) features: float images in [0, 1] of 32 x 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(channels, dim, 8, stride=8), nn.Tanh(), nn.Flatten(2), _Mean()).eval()


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=-1)


def random_images(count: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    """uint8 (count, channels, 32, 32)."""
    return torch.randint(
        0, 256, (count, channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def tiny_sweep(**changes: Any) -> Any:
    """2 schedulers x 2 step counts on the tiny pipeline, 6 images a cell in batches of 2, FID and CLIP score."""
    from fewstep import eval as evaluation

    request: dict[str, Any] = {
        "model": tiny_pipeline(),
        "schedulers": SCHEDULERS,
        "steps": (2, 3),
        "samples": 6,
        "guidance": 3.0,
        "batch_size": 2,
        "prompts": PROMPTS,
        "metrics": (evaluation.Fid(random_images(20), tiny_features()), evaluation.ClipScore(tiny_clip())),
    }
    return evaluation.Sweep(**(request | changes))


def killer(moment: int, function: Callable[..., Any] | None = None, suffix: str = "") -> Callable[..., None]:
    """Like ``function``, but its ``moment``-th call, of those that end in ``suffix``, ends this process as a power cut."""
    calls = itertools.count(1)

    def maybe_kill(*arguments: Any) -> None:
        if str(arguments[-1]).endswith(suffix) and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if function is not None:
            function(*arguments)

    return maybe_kill


def main(out: str, what: str, moment: int) -> None:
    torch.set_num_threads(1)
    sweep = tiny_sweep()
    if what == "call":
        sweep.model.unet.register_forward_pre_hook(killer(moment))
    else:
        os.replace = killer(moment, os.replace, ".safetensors")
    sweep.run(out, progress=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
