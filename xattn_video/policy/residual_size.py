"""How much memory the residuals of a generation take."""


def residual_bytes(
    *, batch: int, tokens: int, heads: int, head_dim: int, layers: int, scale_bytes: int
) -> int:
    """Bytes of the residuals of one forward pass of the transformer.

    Args:
        batch: Number of items.
        tokens: Tokens of an item, text and its padding included.
        heads, head_dim: Heads of the model and their size.
        layers: Layers that run sparse.
        scale_bytes: Bytes of the scale stored with the 8-bit numbers of each token and head.
    """
    return batch * tokens * heads * (head_dim + scale_bytes) * layers
