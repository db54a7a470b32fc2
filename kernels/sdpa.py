"""sdpa: entropy and prefix mass by torch's own fused attention, which also gives each row's log-sum-exp.

Of a query q, with s the scale and p the softmax over the patch keys k alone:

    ℓ = ln Σ_k exp(s q·k)    O = Σ_k p_k k                  attention with the keys as its values
    entropy = −Σ_k p_k ln p_k = ℓ − s q·O
    prefix mass = 1 / (1 + exp(ℓ − ℓ_prefix))               exact to rounding near 0 and near 1

No N×N map is formed, and no code of the other backends' kernels is used: a second opinion on them, and what runs on
CUDA devices without Triton. Arithmetic is float32, float64 for float64 input. Half-precision factors are widened,
since the output of attention would be rounded as they are, which costs 1e-2 nat. ℓ and s q·O are as large as the
logits: those of 100 cost 4e-5 nat, where other backends lose 1e-5. With a bias the entropy needs Σ_k p_k bias_k too,
which no fused kernel gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.arrays import Values
from kernels.backends import Backend
from kernels.cuda.rows import IMPLEMENTATIONS, PLANES, RowValues, tensor_of
from kernels.errors import BackendUnavailableError
from kernels.inputs import Factors
from kernels.metrics import MetricSpec

READ_OFF = ("entropy", "entropy_normalized", "prefix_mass", "cls_entropy")


class SdpaBackend(Backend):
    """Reads every dtype on the CPU, all but float64 on CUDA; query and key without a bias."""

    name = "sdpa"
    implementations: Mapping[str, Callable[..., Any]] = {name: IMPLEMENTATIONS[name] for name in READ_OFF}

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        """A row is valid if its logits have a value; a map whose keys hold infinite values has no valid row."""
        if factors.bias is not None:
            raise BackendUnavailableError(
                "backend 'sdpa' measures query and key without a bias, but this attention has one; choose "
                "another backend"
            )
        prefix = factors.layout.num_prefix_tokens
        q, k = (_readable(tensor_of(array), factors.leading) for array in (factors.query, factors.key))
        values = RowValues.empty(factors, q.dtype, q.device)
        if values.valid.numel():
            on_patches, mean = _row_sums(q, k[..., prefix:, :], factors.scale)
            entropy = on_patches - mean
            valid = entropy.isfinite() & k.isfinite().all(dim=-1).all(dim=-1, keepdim=True)
            mass = torch.zeros_like(entropy)
            if prefix:
                on_prefix, mean = _row_sums(q, k[..., :prefix, :], factors.scale)
                mass = (on_prefix - on_patches).sigmoid()
                valid &= (on_prefix - mean).isfinite()
            for name, found in (("entropy", entropy.clamp(min=0.0)), ("prefix_mass", mass)):
                values.planes[PLANES.index(name)] = torch.where(valid, found, torch.nan).flatten(0, 1)
            values.valid[:] = valid.flatten(0, 1)
        return self.values(values, values.valid, factors, specs)


BACKEND = SdpaBackend()


def _row_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(log-sum-exp of the logits, their mean under the softmax) of every query [image, head, query].

    On CUDA, from sm_80 on, products of float32 are sums of three TF32 ones, whatever `allow_tf32` says. Of a query that
    is not finite the mean is not either; keys that are not can leave both finite.
    """
    if q.is_cuda:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, logsumexp, _, _ = efficient(q, k, k, None, True, scale=scale)
        logsumexp = logsumexp[..., : q.shape[-2]]  # the kernel's rows are a multiple of 32
    else:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    return logsumexp, scale * (q * output).sum(dim=-1)


def _readable(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[image, head, token, dim] in float32 or float64, in place where the kernels can read it there.

    They read four numbers at a time, tokens side by side; zeros behind a head's dimensions change no product.
    """
    if tensor.is_cuda and tensor.dtype == torch.float64:
        raise BackendUnavailableError(
            "backend 'sdpa' reads float16, bfloat16, float32 on CUDA, but the data is float64; convert it or choose "
            "the torch backend"
        )
    shape = math.prod(leading[:-1]), leading[-1] if leading else 1, *tensor.shape[-2:]
    wide = tensor.reshape(shape).to(torch.promote_types(tensor.dtype, torch.float32))
    *steps, step = wide.stride()
    whole = all(size % 4 == 0 for size in (wide.shape[-1], *steps)) and wide.data_ptr() % 16 == 0
    if step == 1 and steps[-1] >= wide.shape[-1] and whole:
        return wide
    return torch.nn.functional.pad(wide, (0, -wide.shape[-1] % 4)).contiguous()
