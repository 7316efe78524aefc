"""The formulas of the operator written as plain loops: what every implementation is held to.

They run in float64 unless told otherwise; ``dtype`` gives the same formula as torch would compute
it in that precision on the tensors' device, which is what an error budget compares with.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def _lengths(key: Tensor, key_lengths: Tensor | None) -> list[int]:
    """The number of valid keys of each item of the batch."""
    if key_lengths is None:
        return [key.shape[-2]] * key.shape[0]
    return [int(length) for length in key_lengths]


def make_lengths(lengths: list[int] | None, device: str | torch.device = "cpu") -> Tensor | None:
    """Valid keys of each item as the kernels take them; None for all."""
    return None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)


def repeat_key_heads(query: Tensor, key: Tensor) -> Tensor:
    """A head of the key, or the value, for every query head: h uses h // (H / Hkv)."""
    group_size = query.shape[1] // key.shape[1]
    return torch.stack([key[:, h // group_size] for h in range(query.shape[1])], dim=1)


def antidiagonal_block_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int = 128,
    stride: int = 8,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Antidiagonal scores of the blocks, `[B, H, Nq, Nk]`.

    A row of blocks is divided by the number of its query groups that see any key, so that it sums
    to 1; a row that sees none (causal, with more queries than keys) is 0.
    """
    B, H, Sq, D = query.shape
    Sk = key.shape[-2]
    key = repeat_key_heads(query, key)
    scale = D**-0.5 if scale is None else scale
    groups_q, groups_k = -(-Sq // stride), -(-Sk // stride)
    per_block = block_size // stride
    scores = torch.zeros(B, H, -(-Sq // block_size), -(-Sk // block_size), dtype=dtype)
    first_keys = torch.arange(groups_k) * stride
    for b, length in enumerate(_lengths(key, key_lengths)):
        visible = (first_keys < length).repeat(groups_q, 1)
        for i in range(groups_q):
            if causal:
                last_query = min(i * stride + stride - 1, Sq - 1)
                visible[i] &= first_keys <= last_query + Sk - Sq
        for h in range(H):
            products = torch.zeros(groups_q, groups_k, dtype=dtype, device=query.device)
            for s in range(stride):
                rows = [min(i * stride + stride - 1 - s, Sq - 1) for i in range(groups_q)]
                columns = [min(j * stride + s, length - 1) for j in range(groups_k)]
                products += query[b, h, rows].to(dtype) @ key[b, h, columns].to(dtype).T
            hidden = ~visible.to(query.device)
            products = (products * (scale / stride)).masked_fill(hidden, -torch.inf)
            weights = torch.nan_to_num(torch.softmax(products, dim=-1), nan=0.0).cpu()
            for m in range(scores.shape[2]):
                of_row = slice(m * per_block, (m + 1) * per_block)
                seeing = int(visible[of_row].any(dim=-1).sum())
                for n in range(scores.shape[3]):
                    of_column = slice(n * per_block, (n + 1) * per_block)
                    if visible[of_row, of_column].any():
                        mass = weights[of_row, of_column].sum() / seeing
                        scores[b, h, m, n] = max(float(mass), TINY)
    return scores


def order_error(stride: int, head_dim: int) -> float:
    """Relative error of scores from the roundings of a product's terms, added one by one."""
    return 2**-24 * (stride * head_dim) ** 0.5


def smallest_set(scores_row: Tensor, threshold: float, forced_row: Tensor | None = None) -> Tensor:
    """The smallest set of blocks of one row that holds the forced ones and the threshold's mass.

    Among equal scores the first block goes first. A block that is not valid (score 0) stays out,
    forced or not.

    Args:
        scores_row: `[Nk]`.
        threshold: Share of the row's sum to keep.
        forced_row: bool `[Nk]`, or None.
    """
    scores = [float(score) for score in scores_row]
    forced = [False] * len(scores) if forced_row is None else [bool(f) for f in forced_row]
    kept = {n for n, score in enumerate(scores) if forced[n] and score > 0}
    candidates = [n for n, score in enumerate(scores) if score > 0 and n not in kept]
    candidates.sort(key=lambda n: -scores[n])
    for n in candidates:
        enough = sum(scores[n] for n in kept) >= threshold * sum(scores)
        if kept and enough and threshold < 1:
            break
        kept.add(n)
    return torch.tensor([n in kept for n in range(len(scores))])


def assert_smallest_set(
    scores_row: Tensor,
    mask_row: Tensor,
    threshold: float,
    forced_row: Tensor | None = None,
    rounding: float = 1e-5,
) -> None:
    """Assert that a row's mask is such a smallest set, whichever of nearly equal blocks it took.

    ``rounding`` is the share of the row's sum by which float32 sums may differ.
    """
    scores, mask = scores_row.double().cpu(), mask_row.bool().cpu()
    valid = scores > 0
    forced = torch.zeros_like(mask) if forced_row is None else forced_row.bool().cpu() & valid
    total = scores.sum()
    assert not (mask & ~valid).any(), "a block that is not valid was kept"
    assert not (forced & ~mask).any(), "a forced block was left out"
    assert mask.any() or not valid.any(), "a row without any block"
    assert scores[mask].sum() >= (threshold - rounding) * total, "the kept mass is too small"
    if threshold >= 1:
        assert torch.equal(mask, valid), "tau = 1 keeps every valid block"
        return
    chosen, left_out = mask & ~forced, valid & ~mask
    if chosen.any() and left_out.any():
        assert scores[chosen].min() >= scores[left_out].max() - rounding * total, (
            "a better block was left out"
        )
    if chosen.any() and mask.sum() > 1:
        without = scores[mask].sum() - scores[chosen].min()
        assert without < (threshold + rounding) * total, "one block fewer would have been enough"


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 128,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention over the blocks of the mask, `[B, H, Sq, D]`; a query that sees no key gives 0."""
    B, H, Sq, D = query.shape
    Sk = key.shape[-2]
    key, value = repeat_key_heads(query, key), repeat_key_heads(query, value)
    scale = D**-0.5 if scale is None else scale
    output = torch.zeros(B, H, Sq, D, dtype=dtype, device=query.device)
    tokens = torch.arange(Sk, device=query.device)
    for b, length in enumerate(_lengths(key, key_lengths)):
        for h in range(H):
            q, k, v = (x[b, h].to(dtype) for x in (query, key, value))
            for m in range(block_mask.shape[2]):
                kept = block_mask[b, h, m].to(q.device).repeat_interleave(block_size)[:Sk]
                rows = torch.arange(m * block_size, min((m + 1) * block_size, Sq), device=q.device)
                visible = (kept & (tokens < length)).expand(len(rows), Sk)
                if causal:
                    visible = visible & (tokens <= rows[:, None] + Sk - Sq)
                products = ((q[rows] @ k.T) * scale).masked_fill(~visible, -torch.inf)
                weights = torch.nan_to_num(torch.softmax(products, dim=-1), nan=0.0)
                output[b, h, rows] = weights @ v
    return output


def masked_log_sum_exp(
    query: Tensor,
    key: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 128,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Log of the sum of exponentials over what `masked_attention` sees, `[B, H, Sq]`.

    A query that sees no key gives -inf.
    """
    B, H, Sq, D = query.shape
    Sk = key.shape[-2]
    key = repeat_key_heads(query, key)
    scale = D**-0.5 if scale is None else scale
    output = torch.full((B, H, Sq), -torch.inf, dtype=dtype)
    for b, length in enumerate(_lengths(key, key_lengths)):
        for h in range(H):
            products = (query[b, h].to(dtype) @ key[b, h].to(dtype).T * scale).cpu()
            for t in range(Sq):
                end = min(length, t + Sk - Sq + 1) if causal else length
                kept = block_mask[b, h, t // block_size].cpu().repeat_interleave(block_size)
                seen = kept[:Sk] & (torch.arange(Sk) < end)
                if seen.any():
                    largest = products[t, seen].max()
                    total = (products[t, seen] - largest).exp().sum()
                    output[b, h, t] = largest + total.log()
    return output


def assert_within_budget(
    actual: Tensor, reference64: Tensor, same_dtype_torch: Tensor, *, relative_error: float = 0.0
) -> None:
    """Assert that a result errs at most twice as much as torch does in the same precision.

    |actual - fp64| <= 2 |torch in the same dtype - fp64| + (eps + relative_error) max|fp64|, where
    the errors are the largest over the tensor and eps is that of the dtype.

    Args:
        actual: The result under test.
        reference64: The formula in float64.
        same_dtype_torch: The formula as torch computes it in the dtype of the inputs.
        relative_error: What the way to compute it adds to that: a device's exp2, where torch's own
            exponential is more exact, or terms added in another order.
    """
    assert actual.shape == reference64.shape, f"{actual.shape} != {reference64.shape}"
    reference = reference64.double().cpu()
    error = (actual.double().cpu() - reference).abs()
    assert torch.isfinite(error).all(), (
        f"{int((~torch.isfinite(error)).sum())} values are not finite"
    )
    theirs = (same_dtype_torch.double().cpu() - reference).abs().max()
    eps = torch.finfo(same_dtype_torch.dtype).eps
    budget = float(2 * theirs + (eps + relative_error) * reference.abs().max())
    assert float(error.max()) <= budget, f"error {float(error.max()):.3e} exceeds {budget:.3e}"
