"""The package we are compared with: diffusers' own pipeline on the same weights, as its documentation runs it.

Where diffusers leaves a choice, the faster one is taken: 16-bit VAE in a 16-bit run, frames rounded on the device.
Its prompt is encoded apart, so that the time of the text is known; nothing else is changed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from swiftwan.device import Device, parse_dtype, peak_bytes
from swiftwan.errors import RequestError
from swiftwan.models.config import KnownModel, TransformerConfig, VAEConfig
from swiftwan.models.dit import KEEP_FP32, TEXT_LENGTH, WanTransformer
from swiftwan.models.vae import WanVAE
from swiftwan.pipelines.clock import Clock
from swiftwan.sampling import diffusers_scheduler
from swiftwan.weights.build import UMT5_XXL
from swiftwan.weights.find import Folder, locate
from swiftwan.weights.layout import RandomModel
from swiftwan.weights.load import randomize

if TYPE_CHECKING:
    from swiftwan.pipelines.generate import OnStep
    from swiftwan.pipelines.request import Request


@dataclass(frozen=True)
class PeerRun:
    """What a peer's run leaves; the fields are those of swiftwan's ``Result``."""

    frames: Tensor
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: tuple[float, ...]
    peak_bytes: int


class DiffusersPeer:
    """``diffusers.WanPipeline`` with a model loaded.

    Args:
        model: as ``Engine.load`` takes it; ``random:`` models get the very weights that swiftwan makes.
        compile: the transformer by torch.compile.
    """

    def __init__(self, model: str, device: Device, dtype: str, *, compile: bool) -> None:
        self.device = device
        self.torch_device = torch.device(device.torch_device)
        source = locate(model)
        wanted = parse_dtype(dtype)
        if isinstance(source, Folder):
            self.pipe: Any = WanPipeline.from_pretrained(source.path, dtype=wanted, local_files_only=True)
            self.pipe.to(self.torch_device)
        elif isinstance(source, RandomModel):
            self.pipe = _random_pipeline(source.known, self.torch_device, wanted)
        else:
            raise RequestError(f"diffusers reads no '{model}'; make a folder of it first: swiftwan convert {model} OUT")
        self.pipe.set_progress_bar_config(disable=True)
        if compile:
            for transformer in filter(None, (self.pipe.transformer, self.pipe.transformer_2)):
                transformer.compile(fullgraph=True)

    def run(self, request: Request, *, on_step: OnStep | None = None) -> PeerRun:
        """Run a completed request."""
        assert request.scheduler is not None
        assert request.num_inference_steps is not None
        assert request.flow_shift is not None
        assert request.guidance_scale is not None
        assert request.seed is not None
        if self.torch_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch_device)
        clock = Clock(self.torch_device)
        told: dict[str, int] = {}

        def done(phase: Any, units: int) -> None:
            clock.mark(phase)
            told[phase] = told.get(phase, 0) + 1
            if on_step is not None:
                on_step(_event(phase, told[phase], units))

        with torch.no_grad():  # as the pipeline's own call has it; else 10 GB stay for gradients that nobody asks for
            prompt, negative = self.pipe.encode_prompt(
                request.prompt,
                request.negative_prompt,
                do_classifier_free_guidance=request.guidance_scale > 1,
                max_sequence_length=TEXT_LENGTH,  # its own default is less than what the pipeline asks of it
                device=self.torch_device,
            )
        done("text", 1)
        self.pipe.scheduler = diffusers_scheduler(
            request.scheduler,
            num_inference_steps=request.num_inference_steps,
            flow_shift=request.flow_shift,
            device=self.torch_device,
        )
        last: list[Tensor] = []

        def after_step(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            last[:] = [values["latents"]]
            done("denoise", request.num_inference_steps or 0)
            return values

        video = self.pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=after_step,
        ).frames[0]
        frames = (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
        done("decode", 1)
        return PeerRun(
            frames=frames,
            latents=last[0].float().cpu(),
            seconds=clock.seconds(),
            step_seconds=clock.units("denoise"),
            peak_bytes=peak_bytes(self.device),
        )


def _event(phase: Any, step: int, steps: int) -> Any:
    from swiftwan.pipelines.result import StepEvent

    return StepEvent(phase, step, steps, 0.0)


def _random_pipeline(known: KnownModel, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' classes around the tensors that ``random:`` gives swiftwan: same names, same values."""

    def transformer(seed: int) -> Any:
        with torch.device("meta"):
            ours = WanTransformer(known.transformer)
        randomize(ours, device=device, dtype=dtype, keep_fp32=KEEP_FP32, seed=seed)
        model = _take_over(WanTransformer3DModel, known.transformer, ours.state_dict())
        # Its tables are computed when it is made, and are not among the weights.
        config = known.transformer
        model.rope = type(model.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len).to(device)
        return model

    sizes: dict[str, Any] = dict(UMT5_XXL)
    with torch.device("meta"):
        vae = WanVAE(known.vae)
        encoder = UMT5EncoderModel(UMT5Config(**sizes)).eval()
    randomize(vae, device=device, dtype=dtype)
    randomize(encoder, device=device, dtype=dtype)
    pocket = locate("pocket")
    assert isinstance(pocket, Folder)
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pocket.path / "tokenizer", local_files_only=True),
        text_encoder=encoder,
        vae=_take_over(AutoencoderKLWan, known.vae, vae.state_dict()),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=transformer(0),
        transformer_2=transformer(1) if known.boundary_ratio else None,
        boundary_ratio=known.boundary_ratio,
        expand_timesteps=known.expand_timesteps,
    )


def _take_over(kind: Any, config: TransformerConfig | VAEConfig, weights: dict[str, Tensor]) -> Any:
    sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    with torch.device("meta"):
        model = kind(**sizes)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
