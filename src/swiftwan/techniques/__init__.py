"""Every technique by its name."""

from swiftwan.techniques.base import Technique
from swiftwan.techniques.caches import DeepCache, StepCache
from swiftwan.techniques.guidance import BatchedCfg, CfgInterval, CfgSkip
from swiftwan.techniques.lora import Lora
from swiftwan.techniques.offload import Offload
from swiftwan.techniques.precision import Dtype, Tf32
from swiftwan.techniques.prompts import PromptCaching, TextEncoderHome
from swiftwan.techniques.quantize import Quantize
from swiftwan.techniques.sparse import SparseAttention
from swiftwan.techniques.vae import Vae

_ALL: tuple[type[Technique], ...] = (
    BatchedCfg,
    CfgInterval,
    CfgSkip,
    DeepCache,
    Dtype,
    Lora,
    Offload,
    PromptCaching,
    Quantize,
    SparseAttention,
    StepCache,
    TextEncoderHome,
    Tf32,
    Vae,
)

TECHNIQUES = {technique.name: technique for technique in _ALL}
