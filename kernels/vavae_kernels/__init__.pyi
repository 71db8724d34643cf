"""What type checkers see of names that load when they are first used."""

from .attention_backends import attention as attention
from .attention_backends import backend_table as backend_table
from .attention_backends import register_backend as register_backend
from .ops.adamw_ema import AdamWEMA as AdamWEMA
from .ops.flow_interpolate import flow_interpolate as flow_interpolate
from .ops.flow_loss import flow_loss as flow_loss
from .ops.gate_add_norm_modulate import gate_add_norm_modulate as gate_add_norm_modulate
from .ops.group_norm_silu import group_norm_silu as group_norm_silu
from .ops.norm_modulate import norm_modulate as norm_modulate
from .ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from .ops.qk_norm_rope_attention import qk_norm_rope_attention as qk_norm_rope_attention
from .ops.rms_norm import rms_norm as rms_norm
from .ops.swiglu import swiglu as swiglu
from .ops.vf_loss import vf_loss as vf_loss
from .patching import patch as patch
