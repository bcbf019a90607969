"""ReLU in Triton: one launch forward, one backward. Formulas: reference.py.

Dense tensors are walked in the order of memory, whatever their strides.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host


@triton.jit
def relu_fwd_kernel(u_ptr, v_ptr, mask_ptr, n, BLOCK: tl.constexpr):
    """BLOCK elements of v, which may be u, and their bits."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    closed = u <= 0  # false for NaN, which stays
    tl.store(v_ptr + i, tl.where(closed, 0.0, u).to(v_ptr.dtype.element_ty), mask=i < n)
    if mask_ptr is not None:
        bits = tl.reshape((closed == 0).to(tl.int32), (BLOCK // 8, 8))
        mask_bytes = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        q = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + q, mask_bytes.to(tl.uint8), mask=q * 8 < n)


@triton.jit
def relu_bwd_kernel(
    grad_ptr, output_ptr, mask_ptr, grad_u_ptr, n, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of grad_u, by the mask where there is one, else by the output."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    if GUIDED:
        grad = tl.where(grad < 0, 0.0, grad)  # keeps NaN
    if mask_ptr is not None:
        q = start // 8 + tl.arange(0, BLOCK // 8)
        mask_bytes = tl.load(mask_ptr + q, mask=q * 8 < n, other=0)
        bits = (mask_bytes[:, None] >> tl.arange(0, 8).to(tl.uint8)[None, :]) & 1
        closed = tl.reshape(bits, (BLOCK,)) == 0
    else:
        closed = tl.load(output_ptr + i, mask=i < n, other=0.0).to(tl.float32) <= 0
    grad_u = tl.where(closed, 0.0, grad)
    tl.store(grad_u_ptr + i, grad_u.to(grad_u_ptr.dtype.element_ty), mask=i < n)


def block_of(tensor: Tensor) -> int:
    """Elements of one program: fewer where the tensor is small, so that all processors have one."""
    block, wanted = (
        host.TILE,
        host.PROGRAMS_PER_MULTIPROCESSOR * host.multiprocessors(tensor.device),
    )
    while block > 1024 and tensor.numel() < wanted * block:
        block //= 2
    return block


def relu_fwd(u: Tensor, inplace: bool, want_mask: bool) -> tuple[Tensor, Tensor]:
    """v, dense as u is (u itself with ``inplace``), and the mask (empty unless wanted)."""
    v = u if inplace else torch.empty_like(u)
    mask = u.new_empty(host.cdiv(u.numel(), 8) if want_mask else 0, dtype=torch.uint8)
    if u.numel():
        block = block_of(u)
        host.launch(
            relu_fwd_kernel, (host.cdiv(u.numel(), block),), u,
            u, v, mask if want_mask else None, u.numel(), BLOCK=block, num_warps=host.NUM_WARPS,
        )  # fmt: skip
    return v, mask


def relu_bwd(grad: Tensor, kept: Tensor, guided: bool) -> Tensor:
    """grad_u, in dtype and strides of ``grad``, from v or the mask (uint8)."""
    grad_u = torch.empty_like(grad)
    if grad.numel():
        masks = kept.dtype == torch.uint8
        block = block_of(grad)
        host.launch(
            relu_bwd_kernel, (host.cdiv(grad.numel(), block),), grad,
            grad, None if masks else kept, kept if masks else None, grad_u, grad.numel(),
            GUIDED=guided, BLOCK=block, num_warps=host.NUM_WARPS,
        )  # fmt: skip
    return grad_u
