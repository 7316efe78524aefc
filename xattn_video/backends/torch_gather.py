"""Gathers the kept blocks of each row and runs SDPA on them: runs anywhere, fast on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.ops.problem import AttentionInputs, Problem, empty_output

NAME = "torch_gather"

# Rows of blocks in one SDPA call: enough to keep a CPU's cores busy, and few enough that their
# keys and values stay in its caches.
_ROWS_AT_ONCE = 2


def unsupported_reasons(problem: Problem) -> list[str]:
    """An empty list: this backend runs on every device, dtype and size."""
    return []


def forward(inputs: AttentionInputs, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Loop over the rows of blocks. The host reads the lists, so a GPU has to wait."""
    B, H, Sq, _ = inputs.query.shape
    out = empty_output(inputs.query)
    lse = (
        inputs.query.new_full((B, H, Sq), -torch.inf, dtype=torch.float32) if return_lse else None
    )
    counts, indices = inputs.blocks.counts.tolist(), inputs.blocks.indices.cpu()
    lengths = [inputs.key.shape[2]] * B
    if inputs.key_lengths is not None:
        lengths = inputs.key_lengths.tolist()
    for item in range(B):
        for head in range(H):
            listed = zip(indices[item, head], counts[item][head], strict=True)
            rows = [row[:count] for row, count in listed]
            _attend_head(inputs, out, lse, rows, item, head, lengths[item])
    return out, lse


def _attend_head(
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor | None,
    rows: list[Tensor],
    item: int,
    head: int,
    key_length: int,
) -> None:
    """Write one head of `out` and of `lse`, given the kept blocks of each row."""
    block_size = inputs.block_size
    num_blocks = -(-key_length // block_size)
    # [num_blocks, block_size, D]
    key_head = head * inputs.key.shape[1] // inputs.query.shape[1]
    key = _split_blocks(inputs.key[item, key_head, :key_length], block_size)
    value = _split_blocks(inputs.value[item, key_head, :key_length], block_size)
    query = inputs.query[item, head]
    tail = num_blocks * block_size - key_length
    offset = inputs.key.shape[2] - query.shape[0]
    # Rows of whole blocks in which every query sees a key, grouped by the number of kept blocks
    # and the causal bias.
    alike: dict[tuple[int, tuple[int, ...]], list[tuple[int, Tensor]]] = {}
    for row, listed in enumerate(rows):
        start = row * block_size
        tokens = slice(start, start + block_size)
        queries = query[tokens]
        # Listed blocks without a valid key come last.
        indices = listed if key_length == inputs.key.shape[2] else listed[listed < num_blocks]
        if len(indices) == 0:
            out[item, head, tokens] = 0
            continue
        # The blocks ascend, so a cut block can only be the last one.
        cut = tail if indices[-1] == num_blocks - 1 else 0
        late = _late_blocks(indices, start + offset, block_size) if inputs.causal else ()
        blind = len(late) == len(indices) and late[0] > 0
        if len(queries) == block_size and not cut and not blind:
            alike.setdefault((len(indices), late), []).append((row, indices))
            continue
        picked = indices.to(key.device)
        num_keys = len(picked) * block_size - cut
        keys = key.index_select(0, picked).flatten(0, 1)[:num_keys]
        values = value.index_select(0, picked).flatten(0, 1)[:num_keys]
        bias = _causal_bias(key, len(picked), late)
        if bias is not None:
            bias = bias[: len(queries), :num_keys]
        out[item, head, tokens] = _attend(queries, keys, values, bias, inputs.scale)
        if lse is not None:
            lse[item, head, tokens] = _log_sum_exp(queries, keys, bias, inputs.scale)
    whole = query[: len(query) // block_size * block_size].unflatten(0, (-1, block_size))
    for (count, late), group in alike.items():
        bias = _causal_bias(key, count, late)
        for first in range(0, len(group), _ROWS_AT_ONCE):
            some = group[first : first + _ROWS_AT_ONCE]
            attended = _attend_rows(whole, key, value, some, bias, inputs.scale, lse is not None)
            for (row, _), row_out, row_lse in zip(some, *attended, strict=True):
                tokens = slice(row * block_size, (row + 1) * block_size)
                out[item, head, tokens] = row_out
                if lse is not None:
                    lse[item, head, tokens] = row_lse


def _late_blocks(indices: Tensor, last_key: int, block_size: int) -> tuple[int, ...]:
    """First keys, relative to ``last_key``, of the listed blocks that hold keys after it."""
    late = []
    for block in reversed(indices.tolist()):
        if (block + 1) * block_size - 1 <= last_key:
            break
        late.append(block * block_size - last_key)
    return tuple(reversed(late))


def _causal_bias(keys: Tensor, num_blocks: int, late: tuple[int, ...]) -> Tensor | None:
    """The causal bias of a row of blocks, -inf for hidden keys and else 0; None if none is hidden.

    Args:
        keys: `[N, block_size, D]`; gives block size, dtype and device.
        num_blocks: Blocks that the row keeps.
        late: Result of `_late_blocks` for the row.

    Returns:
        `[block_size, num_blocks * block_size]`.
    """
    if not late:
        return None
    block_size = keys.shape[1]
    bias = keys.new_zeros(block_size, num_blocks, block_size)
    positions = torch.arange(block_size, device=keys.device)
    for place, first_key in enumerate(late, start=num_blocks - len(late)):
        hidden = first_key + positions > positions[:, None]
        bias[:, place].masked_fill_(hidden, -torch.inf)
    return bias.flatten(1)


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[tuple[int, Tensor]],
    bias: Tensor | None,
    scale: float,
    needs_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of rows that keep equally many blocks, each its own: `[R, block_size, D]`.

    Query, key and value are in blocks, `[N, block_size, D]`; all rows share the bias,
    `[block_size, keys]`. The log-sum-exp, `[R, block_size]`, is valid only with ``needs_lse``.
    """
    numbers = torch.tensor([row for row, _ in rows], device=query.device)
    picked = torch.cat([indices for _, indices in rows]).to(key.device)
    shape = (len(rows), 1, -1, key.shape[-1])
    keys = key.index_select(0, picked).view(shape)
    values = value.index_select(0, picked).view(shape)
    queries = query.index_select(0, numbers)[:, None]
    if needs_lse and query.device.type == "cpu":
        # The kernel that SDPA runs here; SDPA does not return its log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias, scale=scale
        )
        return out[:, 0], lse.view(len(rows), -1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)[:, 0]
    lse = _log_sum_exp(queries, keys, bias, scale)[:, 0] if needs_lse else out[..., 0]
    return out, lse


def _split_blocks(tokens: Tensor, block_size: int) -> Tensor:
    """`[S, D]` -> contiguous `[N, block_size, D]`, the last block filled up with zeros."""
    tokens = F.pad(tokens, (0, 0, 0, -len(tokens) % block_size)).contiguous()
    return tokens.unflatten(0, (-1, block_size))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Dense attention of one head, `[Sq, D]`; a query that sees no key gets 0."""
    out = F.scaled_dot_product_attention(
        query[None, None], key[None, None], value[None, None], attn_mask=bias, scale=scale
    )[0, 0]
    if bias is not None:
        out = out.where((bias == 0).any(dim=-1, keepdim=True), 0.0)
    return out


def _log_sum_exp(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Natural logarithm of each query's sum of exponentials, float32 `[..., Sq]`."""
    products = (query.float() @ key.float().mT) * scale
    if bias is not None:
        products = products + bias
    return products.logsumexp(dim=-1)
