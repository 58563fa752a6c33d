"""Every technique by its name."""

from swiftwan.techniques.attention import Attention
from swiftwan.techniques.base import Technique
from swiftwan.techniques.caches import DeepCache, StepCache
from swiftwan.techniques.compile import Compile
from swiftwan.techniques.few_step import FewStepModel
from swiftwan.techniques.fused import Fused
from swiftwan.techniques.graphs import CudaGraphs
from swiftwan.techniques.guidance import BatchedCfg, CfgInterval, CfgSkip
from swiftwan.techniques.lora import Lora
from swiftwan.techniques.offload import Offload
from swiftwan.techniques.precision import Dtype, Tf32
from swiftwan.techniques.progressive import ProgressiveResolution
from swiftwan.techniques.prompts import PromptCaching, TextEncoderHome
from swiftwan.techniques.quantize import Quantize
from swiftwan.techniques.slicing import AttentionSlicing
from swiftwan.techniques.sparse import SparseAttention
from swiftwan.techniques.vae import ChannelsLast, Vae

_ALL: tuple[type[Technique], ...] = (
    Attention,
    AttentionSlicing,
    BatchedCfg,
    CfgInterval,
    CfgSkip,
    ChannelsLast,
    Compile,
    CudaGraphs,
    DeepCache,
    Dtype,
    FewStepModel,
    Fused,
    Lora,
    Offload,
    ProgressiveResolution,
    PromptCaching,
    Quantize,
    SparseAttention,
    StepCache,
    TextEncoderHome,
    Tf32,
    Vae,
)

TECHNIQUES = {technique.name: technique for technique in _ALL}
