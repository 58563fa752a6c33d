"""What a Wan model is: its sizes, and the official defaults of each published one.

Sizes are read from a checkpoint's ``config.json`` (diffusers' field names). Defaults are not: they come
from the table below, since converted scheduler files carry a flow shift of 3 where the official code
runs 5 or 12 (github.com/huggingface/diffusers, scripts/convert_wan_to_diffusers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from swiftwan.errors import WeightsError

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""``sample_neg_prompt`` of github.com/Wan-Video/Wan2.1 and Wan2.2, wan/configs/shared_config.py."""

# Wan2.1 alone names the camera's faults first: wan/configs/wan_i2v_14B.py and wan/configs/__init__.py there.
_NEGATIVE_PROMPT_I2V = "镜头晃动，" + WAN_NEGATIVE_PROMPT
_NEGATIVE_PROMPT_FLF2V = "镜头切换，" + _NEGATIVE_PROMPT_I2V


class _FromJson:
    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a diffusers ``config.json``; lists become tuples, other fields are left."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**frozen)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class TransformerConfig(_FromJson):
    """Sizes of a Wan DiT, by diffusers' names (``WanTransformer3DModel``)."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise WeightsError(
                f"the transformer's config.json asks for qk_norm {self.qk_norm!r}; every published Wan model "
                "uses 'rms_norm_across_heads'. Is this a Wan checkpoint?"
            )

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VAEConfig(_FromJson):
    """Sizes of a Wan VAE, by diffusers' names (``AutoencoderKLWan``)."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # diffusers' spelling
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8


WAN21_VAE = VAEConfig()

WAN22_VAE = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    temperal_downsample=(False, True, True),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),  # fmt: skip
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),  # fmt: skip
)  # fmt: skip


@dataclass(frozen=True)
class ClipConfig(_FromJson):
    """Sizes of the vision tower of a CLIP, by transformers' names (``CLIPVisionConfig``); ViT-H, as Wan2.1-I2V has."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Defaults:
    """What the official code runs when the user says nothing."""

    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    num_frames: int
    fps: int
    width: int
    height: int
    guidance_scale_2: float | None = None
    scheduler: str = "unipc"
    negative_prompt: str = WAN_NEGATIVE_PROMPT


@dataclass(frozen=True)
class KnownModel:
    """One published model: sizes, hub id, official defaults.

    ``boundary_ratio`` is the share of the 1000 training timesteps from which the high-noise expert runs;
    None for models with one transformer. ``expand_timesteps`` marks TI2V-5B, whose first latent frame may
    carry a timestep of its own.
    """

    name: str
    hub_id: str
    transformer: TransformerConfig
    vae: VAEConfig
    defaults: Defaults
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    sizes: tuple[tuple[int, int], ...] = field(default=())
    """Width x height pairs the model was released for; others run, outside what it was trained on."""

    @property
    def image_start(self) -> Literal["channels", "first frame"] | None:
        """How a video begins with an image: as channels beside the noise, as a clean first frame, or not at all."""
        if self.transformer.in_channels != self.transformer.out_channels:
            return "channels"
        return "first frame" if self.expand_timesteps else None

    @property
    def image_end(self) -> Literal["always", "if given", "never"]:
        """Whether a video may end with an image too. Models with CLIP were trained for one image, or for two."""
        if self.image_start != "channels":
            return "never"
        if self.transformer.image_dim is None:
            return "if given"
        return "never" if self.transformer.pos_embed_seq_len is None else "always"


_SIZE_480P = ((832, 480), (480, 832))
_SIZE_720P = ((1280, 720), (720, 1280))
_DIT_14B = TransformerConfig()
_DIT_I2V_14B = TransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)

KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="wan2.1-t2v-1.3b",
            hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            transformer=TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
            vae=WAN21_VAE,
            defaults=Defaults(50, 5.0, 6.0, 81, 16, 832, 480),
            sizes=_SIZE_480P,
        ),
        KnownModel(
            name="wan2.1-t2v-14b",
            hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            transformer=_DIT_14B,
            vae=WAN21_VAE,
            defaults=Defaults(50, 5.0, 5.0, 81, 16, 1280, 720),
            sizes=_SIZE_720P + _SIZE_480P,
        ),
        KnownModel(
            name="wan2.1-i2v-14b-480p",
            hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            transformer=_DIT_I2V_14B,
            vae=WAN21_VAE,
            defaults=Defaults(40, 3.0, 5.0, 81, 16, 832, 480, negative_prompt=_NEGATIVE_PROMPT_I2V),
            sizes=_SIZE_480P,
        ),
        KnownModel(
            name="wan2.1-i2v-14b-720p",
            hub_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            transformer=_DIT_I2V_14B,
            vae=WAN21_VAE,
            defaults=Defaults(40, 5.0, 5.0, 81, 16, 1280, 720, negative_prompt=_NEGATIVE_PROMPT_I2V),
            sizes=_SIZE_720P,
        ),
        KnownModel(
            name="wan2.1-flf2v-14b",
            hub_id="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            transformer=TransformerConfig(
                in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514
            ),
            vae=WAN21_VAE,
            defaults=Defaults(50, 16.0, 5.0, 81, 16, 1280, 720, negative_prompt=_NEGATIVE_PROMPT_FLF2V),
            sizes=_SIZE_720P,
        ),
        KnownModel(
            name="wan2.2-ti2v-5b",
            hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            transformer=TransformerConfig(
                num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30
            ),
            vae=WAN22_VAE,
            defaults=Defaults(50, 5.0, 5.0, 121, 24, 1280, 704),
            expand_timesteps=True,
            sizes=((1280, 704), (704, 1280)),
        ),
        KnownModel(
            name="wan2.2-t2v-a14b",
            hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            transformer=_DIT_14B,
            vae=WAN21_VAE,
            defaults=Defaults(40, 12.0, 4.0, 81, 16, 1280, 720, guidance_scale_2=3.0),
            boundary_ratio=0.875,
            sizes=_SIZE_720P + _SIZE_480P,
        ),
        KnownModel(
            name="wan2.2-i2v-a14b",
            hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            transformer=TransformerConfig(in_channels=36),
            vae=WAN21_VAE,
            defaults=Defaults(40, 5.0, 3.5, 81, 16, 1280, 720, guidance_scale_2=3.5),
            boundary_ratio=0.9,
            sizes=_SIZE_720P + _SIZE_480P,
        ),
    )
}

POCKET_DEFAULTS = Defaults(
    num_inference_steps=20,
    flow_shift=3.0,
    guidance_scale=3.0,
    num_frames=33,
    fps=16,
    width=128,
    height=128,
    negative_prompt="",
)

POCKET = KnownModel(
    name="pocket",
    hub_id="",
    transformer=TransformerConfig(
        num_attention_heads=4, attention_head_dim=64, text_dim=192, ffn_dim=768, num_layers=7
    ),
    vae=VAEConfig(base_dim=16, dim_mult=(1, 2, 3, 3), num_res_blocks=1),
    defaults=POCKET_DEFAULTS,
    expand_timesteps=True,
    sizes=((128, 128),),
)
"""The embedded model (decision 0004); its latents' statistics are in its own config.json."""
