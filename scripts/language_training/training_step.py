"""One step of the training, and the attention that makes it the same at every length."""

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, LlamaForCausalLM

from language_training.sequences import PADDING, Batch

_SAMPLED_QUERIES = 32
# Compiled kernels and the memory of the optimizers have to be there before a graph is recorded.
_RUNS_BEFORE_GRAPH = 3


class FoldedAttention:
    """Causal attention of sequences that the model sees as one.

    All but attention works on single tokens. The model therefore gets the same number of tokens
    at every length, as one row, and its compiled layers never change.

    Attributes:
        length: Tokens of a sequence.
        entropies: Of sampled queries' attention in each layer, in nats.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self.entropies: list[Tensor] = []
        self._backend = _fastest(device)

    @torch.compiler.disable
    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of `[1, H, tokens, D]`; returns `[1, tokens, H, D]`."""
        groups = query.shape[1] // key.shape[1]
        query, key, value = (self._fold(one) for one in (query, key, value))
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
        self.entropies.append(_entropy(query, key))
        with sdpa_kernel(self._backend):
            out = _attend(query, key, value)
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None

    def _fold(self, one: Tensor) -> Tensor:
        return one[0].transpose(0, 1).unflatten(0, (-1, self.length)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _entropy(query: Tensor, key: Tensor) -> Tensor:
    """The mean entropy of the attention of a few queries of each sequence, in nats.

    Query and key are `[B, H, S, D]`.
    """
    length = query.shape[2]
    rows = torch.randint(length, (_SAMPLED_QUERIES,), device=query.device)
    sampled = query[:, :, rows] * query.shape[-1] ** -0.5
    scores = sampled @ key.mT
    later = torch.arange(length, device=query.device) > rows[:, None]
    logs = scores.float().masked_fill(later, -1e9).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _fastest(device: torch.device) -> SDPBackend:
    """The faster of the two kernels that a GPU has, forward and backward."""
    if device.type == "cpu":
        return SDPBackend.FLASH_ATTENTION
    seconds = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        one = torch.randn(4, 6, 16384, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        # A kernel that this build lacks is not the fastest.
        with suppress(RuntimeError), sdpa_kernel(backend):
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                _attend(one, one, one).sum().backward()
                torch.cuda.synchronize()
            seconds[backend] = time.perf_counter() - start
    print(f"attention of 65,536 tokens: {seconds}", flush=True)
    return min(seconds, key=lambda backend: seconds[backend])


class TrainingStep:
    """One step of the optimizers, for sequences of any length.

    Muon trains the matrices of the layers, which learn to copy in a quarter of AdamW's steps.

    A step launches two thousand kernels. On a GPU that takes up to three times as long as they
    run, so each length's step is recorded as a CUDA graph after it ran a few times.
    """

    def __init__(self, model: LlamaForCausalLM, tokens: int, device: torch.device) -> None:
        self._model = model
        self._attention = FoldedAttention(device)
        AttentionInterface.register("folded", self._attention)
        model.set_attn_implementation("folded")
        self._places = torch.arange(tokens, device=device).unsqueeze(0)
        # A graph reads and writes these.
        self._ids, self._positions = torch.zeros(2, 1, tokens, dtype=torch.long, device=device)
        self._shares = torch.zeros(2, tokens, device=device)
        self._others = torch.zeros(3, tokens, dtype=torch.long, device=device)
        self._rate, self._entropy = torch.zeros(2, device=device)
        self._result = torch.zeros(3, device=device)
        self._matrices = [one for one in model.model.layers.parameters() if one.dim() > 1]
        vectors = [one for one in model.parameters() if one.dim() == 1]
        embedding = model.get_input_embeddings().weight
        # Muon takes its rate as a number, which a graph would keep: its full step is shortened.
        self._muon = torch.optim.Muon(
            self._matrices, lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            [
                {"params": [embedding], "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self._rate,
            betas=(0.9, 0.98),
            capturable=embedding.is_cuda,
        )
        self._runs: Counter[int] = Counter()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, batch: Batch, rate: float, entropy: float = 0.0) -> Tensor:
        """Learn from a batch.

        Args:
            batch: Of sequences.
            rate: The learning rate.
            entropy: What a nat of the attention's mean entropy counts in the loss.

        Returns:
            The answers' loss and accuracy, and the entropy in nats, `[3]`.
        """
        self._ids.copy_(batch.ids)
        torch.remainder(self._places, batch.length, out=self._positions)
        self._shares.copy_(batch.shares)
        self._others.copy_(batch.others)
        self._rate.fill_(rate)
        self._entropy.fill_(entropy)
        self._attention.length = batch.length
        if batch.length in self._graphs:
            self._graphs[batch.length].replay()
        elif self._ids.is_cuda:
            self._run_beside()
            self._runs[batch.length] += 1
            if self._runs[batch.length] == _RUNS_BEFORE_GRAPH:
                self._graphs[batch.length] = self._record()
        else:
            self._run()
        return self._result.clone()

    def _run_beside(self) -> None:
        """Run on a stream of its own, as a graph's first runs have to."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def _run(self) -> None:
        self._attention.entropies.clear()
        for optimizer in (self._muon, self._adamw):
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._ids.device.type, torch.bfloat16, enabled=self._ids.is_cuda):
            logits = (
                self._model(self._ids, position_ids=self._positions, use_cache=False)
                .logits[0]
                .float()
            )
        next_ids = self._ids[0].roll(-1)
        targets = torch.cat((next_ids[None], self._others)).T
        none = torch.cat((torch.zeros_like(next_ids)[None], self._others == PADDING)).T.bool()
        likely = logits.gather(1, targets).masked_fill(none, -torch.inf).logsumexp(-1)
        of_answers, of_others = self._shares @ (logits.logsumexp(-1) - likely)
        entropy = torch.stack(self._attention.entropies).mean()
        (of_answers + 0.3 * of_others + self._entropy * entropy).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        before = [one.detach().clone() for one in self._matrices]
        self._muon.step()
        with torch.no_grad():
            for old, matrix in zip(before, self._matrices, strict=True):
                matrix.copy_(old.lerp(matrix, self._rate))
            is_right = (logits.argmax(-1, keepdim=True) == targets) & ~none
            right = self._shares[0] @ is_right.any(-1).float()
            self._result.copy_(torch.stack((of_answers.detach(), right, entropy.detach())))
        self._adamw.step()
