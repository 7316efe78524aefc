"""How much memory the residuals of a generation take."""


def residual_bytes(
    *, batch: int, tokens: int, heads: int, head_dim: int, layers: int, scale_bytes: int
) -> int:
    """Bytes of the residuals of one forward pass of the transformer.

    Args:
        batch: Items.
        tokens: Of an item, text and its padding included.
        heads, head_dim: Of the model.
        layers: That run sparse.
        scale_bytes: Of the scale that each token and head has beside its 8-bit numbers.
    """
    return batch * tokens * heads * (head_dim + scale_bytes) * layers
