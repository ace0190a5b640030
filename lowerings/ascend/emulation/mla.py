"""CPU kernels of npu_mla_prolog_v3 (and _functional), MLA before the attention, and of npu_format_cast.

Products of bf16 are accumulated in fp32 and rounded to bf16; sums of int8 products are exact, and multiplied in fp32 by the scales of rows
and then of columns. Norms and rotation compute in fp32. What goes into the second projection of the queries is bf16, or quantised from the
fp32 norm by row: `x * (127 / max|x|)`, half to even. The rotation takes neighbours for pairs and stores halves.

Source: op-plugin doc npu_mla_prolog_v3; ops-transformer attention/mla_prolog/op_kernel (mla_prolog_comm.h: types; service_*.h,
mla_prolog_vector_comm.h: steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import write_slots
from .kv_rmsnorm_rope_cache import rms_norm, rotate
from .registry import check, check_dtype, emulates, refuse

_OP = "npu_mla_prolog_v3"
_Q_LORA, _NOPE, _ROPE, _LATENT = 1536, 128, 64, 512
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_PAGES = (16, 128)
_NZ = 29
_UNSUPPORTED = ("quant_scale_ckv", "quant_scale_ckr", "actual_seq_len", "k_nope_clip_alpha")
_DTYPES = ("token_x_dtype", "weight_dq_dtype", "weight_uq_qr_dtype", "weight_dkv_kr_dtype", "kv_cache_dtype")
_TENSORS = (
    "token_x",
    "weight_dq",
    "weight_uq_qr",
    "weight_uk",
    "weight_dkv_kr",
    "rmsnorm_gamma_cq",
    "rmsnorm_gamma_ckv",
    "rope_sin",
    "rope_cos",
)
_MODES = ("query_norm_flag", "kv_cache_quant_mode", "query_quant_mode", "ckvkr_repo_mode", "quant_scale_repo_mode")


@emulates("npu::npu_format_cast")
def npu_format_cast(input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None) -> Tensor:
    """A copy: a CPU has no formats."""
    refuse("npu_format_cast", customize_dtype=customize_dtype, input_dtype=input_dtype)
    check("npu_format_cast", acl_format == _NZ, f"the CPU kernel knows acl_format {_NZ} (FRACTAL_NZ), not {acl_format}")
    return input.contiguous().clone()


@npu_format_cast.fake
def _(input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None) -> Tensor:
    return input.new_empty(input.shape)


@dataclass(frozen=True)
class _Prolog:
    """A call of the op, checked."""

    x: Tensor
    weight_dq: Tensor
    weight_uq_qr: Tensor
    weight_uk: Tensor
    weight_dkv_kr: Tensor
    gamma_cq: Tensor
    gamma_ckv: Tensor
    sin: Tensor
    cos: Tensor
    options: dict[str, Any]

    @staticmethod
    def of(arguments: dict[str, Any]) -> _Prolog:
        """From all arguments of the op by name."""
        fields: list[Any] = [*(arguments[name] for name in _TENSORS), arguments]
        return _Prolog(*fields)

    def check(self, kv_cache: Tensor, kr_cache: Tensor, index: Tensor | None) -> None:
        refuse(_OP, **{name: self.options[name] for name in (*_UNSUPPORTED, *_DTYPES) if name in self.options})
        for name in _MODES:
            check(_OP, not self.options.get(name, 0), f"the CPU kernel does not support {name}={self.options.get(name)}")
        for name in ("qc_qr_scale", "kc_scale"):
            check(_OP, self.options.get(name, 1.0) == 1.0, f"the CPU kernel does not support {name}")
        check(_OP, self.options.get("cache_mode", "PA_BSND") == "PA_BSND", "the CPU kernel supports cache_mode PA_BSND")
        self._check_sizes(kv_cache, kr_cache, index)
        self._check_types(kv_cache, kr_cache)

    def _check_sizes(self, kv_cache: Tensor, kr_cache: Tensor, index: Tensor | None) -> None:
        tokens, hidden = self.x.shape[0], self.x.shape[-1]
        check(_OP, self.x.dim() == 2, "the CPU kernel supports token_x [T, He]")
        heads = self.weight_uk.shape[0]
        check(_OP, heads in _HEADS, f"the number of heads must be one of {_HEADS}, not {heads}")
        shapes = {
            "weight_dq": (self.weight_dq, (hidden, _Q_LORA)),
            "weight_uq_qr": (self.weight_uq_qr, (_Q_LORA, heads * (_NOPE + _ROPE))),
            "weight_uk": (self.weight_uk, (heads, _NOPE, _LATENT)),
            "weight_dkv_kr": (self.weight_dkv_kr, (hidden, _LATENT + _ROPE)),
            "rmsnorm_gamma_cq": (self.gamma_cq, (_Q_LORA,)),
            "rmsnorm_gamma_ckv": (self.gamma_ckv, (_LATENT,)),
            "rope_sin": (self.sin, (tokens, _ROPE)),
            "rope_cos": (self.cos, (tokens, _ROPE)),
            "kv_cache": (kv_cache, (*kv_cache.shape[:2], 1, _LATENT)),
            "kr_cache": (kr_cache, (*kv_cache.shape[:2], 1, _ROPE)),
        }
        for name, (tensor, shape) in shapes.items():
            check(_OP, tuple(tensor.shape) == shape, f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
            check(_OP, tensor.is_contiguous(), f"{name} must be contiguous")
        check(_OP, kv_cache.shape[1] in _PAGES, f"a page must have one of {_PAGES} tokens, not {kv_cache.shape[1]}")
        check(_OP, index is not None and tuple(index.shape) == (tokens,), f"cache_index must have shape [{tokens}]")

    def _check_types(self, kv_cache: Tensor, kr_cache: Tensor) -> None:
        mode = self.options.get("weight_quant_mode", 0)
        check(_OP, mode in (0, 1, 2), f"weight_quant_mode must be 0, 1 or 2, not {mode}")
        first, second = (torch.int8 if mode == 2 else torch.bfloat16), (torch.int8 if mode else torch.bfloat16)
        for name, tensor in {"token_x": self.x, "weight_dq": self.weight_dq, "weight_dkv_kr": self.weight_dkv_kr}.items():
            check_dtype(_OP, name, tensor, first)
        check_dtype(_OP, "weight_uq_qr", self.weight_uq_qr, second)
        floats = (self.weight_uk, self.gamma_cq, self.gamma_ckv, self.sin, self.cos, kv_cache, kr_cache)
        for tensor in floats:
            check_dtype(_OP, "what is not quantised", tensor, torch.bfloat16)
        wanted = {"dequant_scale_w_uq_qr": mode > 0}
        wanted |= dict.fromkeys(("dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_dkv_kr"), mode == 2)
        for name, given in wanted.items():
            check(_OP, (self.options.get(name) is not None) == given, f"weight_quant_mode {mode} {'needs' if given else 'takes no'} {name}")

    # ---------------------------------------------------------------- computing

    def _linear(self, x: Tensor, rows: Tensor | None, weight: Tensor, columns: Tensor | None) -> Tensor:
        """A projection in fp32: of int8 exact sums, scaled; of bf16 what was rounded to it."""
        if rows is None or columns is None:
            return (x.float() @ weight.float()).to(torch.bfloat16).float()
        sums = (x.double() @ weight.double()).float()
        return sums * rows.reshape(-1, 1) * columns.reshape(1, -1)

    def queries(self) -> tuple[Tensor, Tensor]:
        """The absorbed queries [T, N, 512], and the rotated ones [T, N, 64]."""
        rows = self.options.get("dequant_scale_x")
        latent = self._linear(self.x, rows, self.weight_dq, self.options.get("dequant_scale_w_dq"))
        normed = rms_norm(latent, self.gamma_cq, self.options.get("rmsnorm_epsilon_cq", 1e-5))
        columns = self.options.get("dequant_scale_w_uq_qr")
        rows = None
        if columns is None:
            normed = normed.to(torch.bfloat16)
        else:
            normed, rows = _dynamic_quant(normed, self.options.get("smooth_scales_cq"))
        heads = self._linear(normed, rows, self.weight_uq_qr, columns).unflatten(-1, (-1, _NOPE + _ROPE))
        nope, rope = heads.split([_NOPE, _ROPE], dim=-1)
        absorbed = torch.einsum("tnd,ndc->tnc", nope.to(torch.bfloat16).float(), self.weight_uk.float())
        return absorbed.to(torch.bfloat16), _rotated(rope, self.cos[:, None], self.sin[:, None])

    def keys(self) -> tuple[Tensor, Tensor]:
        """The latent [T, 512] and the rotated keys [T, 64]."""
        rows, columns = self.options.get("dequant_scale_x"), self.options.get("dequant_scale_w_dkv_kr")
        latent, rope = self._linear(self.x, rows, self.weight_dkv_kr, columns).split([_LATENT, _ROPE], dim=-1)
        normed = rms_norm(latent, self.gamma_ckv, self.options.get("rmsnorm_epsilon_ckv", 1e-5))
        return normed.to(torch.bfloat16), _rotated(rope, self.cos, self.sin)


def _dynamic_quant(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 by row, and the scales; a row of zeros gives zeros."""
    if smooth is not None:
        x = x * smooth.reshape(-1)
    most = x.abs().amax(-1, keepdim=True)
    return torch.nan_to_num(torch.round(x * (127.0 / most))).to(torch.int8), most / 127.0


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1), cos, sin).to(torch.bfloat16)


def _run(prolog: _Prolog, kv_cache: Tensor, kr_cache: Tensor, cache_index: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    prolog.check(kv_cache, kr_cache, cache_index)
    assert cache_index is not None
    query, query_rope = prolog.queries()
    for cache, rows in zip((kv_cache, kr_cache), prolog.keys(), strict=True):
        write_slots(_OP, cache, rows[:, None], cache_index)
    return query, query_rope, *_nothing(prolog.x, prolog.weight_uq_qr)


def _nothing(x: Tensor, weight_uq_qr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The results that are not asked for: undefined, of one element."""
    return x.new_zeros(1, dtype=torch.float32), x.new_zeros(1, dtype=weight_uq_qr.dtype), x.new_zeros(1, dtype=torch.float32)


@emulates("npu::npu_mla_prolog_v3")
def npu_mla_prolog_v3(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    *,
    cache_index: Tensor | None = None,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None,
    smooth_scales_cq: Tensor | None = None,
    actual_seq_len: Tensor | None = None,
    k_nope_clip_alpha: Tensor | None = None,
    rmsnorm_epsilon_cq: float = 1e-5,
    rmsnorm_epsilon_ckv: float = 1e-5,
    cache_mode: str = "PA_BSND",
    query_norm_flag: bool = False,
    weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0,
    query_quant_mode: int = 0,
    ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0,
    tile_size: int = 128,
    qc_qr_scale: float = 1.0,
    kc_scale: float = 1.0,
    token_x_dtype: int | None = None,
    weight_dq_dtype: int | None = None,
    weight_uq_qr_dtype: int | None = None,
    weight_dkv_kr_dtype: int | None = None,
    kv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both queries, and three results that are not computed; latent and keys go into the caches."""
    return _run(_Prolog.of(locals()), kv_cache, kr_cache, cache_index)


@npu_mla_prolog_v3.fake
def _(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    *,
    cache_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_queries_like(token_x, weight_uk, rope_sin), *_nothing(token_x, weight_uq_qr)


def _queries_like(token_x: Tensor, weight_uk: Tensor, rope_sin: Tensor) -> tuple[Tensor, Tensor]:
    lead, heads = token_x.shape[:-1], weight_uk.shape[0]
    query = rope_sin.new_empty((*lead, heads, weight_uk.shape[2]))
    return query, rope_sin.new_empty((*lead, heads, rope_sin.shape[-1]), dtype=torch.bfloat16)


@emulates("npu::npu_mla_prolog_v3_functional")
def npu_mla_prolog_v3_functional(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    *,
    cache_index: Tensor | None = None,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None,
    smooth_scales_cq: Tensor | None = None,
    actual_seq_len: Tensor | None = None,
    k_nope_clip_alpha: Tensor | None = None,
    rmsnorm_epsilon_cq: float = 1e-5,
    rmsnorm_epsilon_ckv: float = 1e-5,
    cache_mode: str = "PA_BSND",
    query_norm_flag: bool = False,
    weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0,
    query_quant_mode: int = 0,
    ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0,
    tile_size: int = 128,
    qc_qr_scale: float = 1.0,
    kc_scale: float = 1.0,
    token_x_dtype: int | None = None,
    weight_dq_dtype: int | None = None,
    weight_uq_qr_dtype: int | None = None,
    weight_dkv_kr_dtype: int | None = None,
    kv_cache_dtype: int | None = None,
) -> tuple[Tensor, ...]:
    """npu_mla_prolog_v3 on copies of the caches, which are the last two results."""
    prolog, caches = _Prolog.of(locals()), (kv_cache.clone(), kr_cache.clone())
    return *_run(prolog, *caches, cache_index), *caches


@npu_mla_prolog_v3_functional.fake
def _(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    *,
    cache_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    caches = (torch.empty_like(kv_cache), torch.empty_like(kr_cache))
    return *_queries_like(token_x, weight_uk, rope_sin), *_nothing(token_x, weight_uq_qr), *caches
