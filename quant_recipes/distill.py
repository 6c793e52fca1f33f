"""The loss of a student's hidden states, against the text and against a teacher, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lobit.errors import InputError
from lobit.model import softcap

CHUNK = 4096
"""Entries of the vocabulary whose logits are in memory at once: 8 MiB for 512 tokens, in a few copies."""
IGNORED = -100
"""The target of a token that does not count, as in torch's cross entropy."""


class Teacher(NamedTuple):
    """A teacher's hidden states of the same tokens, and the head that makes logits of them. No gradient reaches them."""

    hidden: Tensor
    """[N, Dt], the teacher's stream after the final norm."""
    weight: Tensor
    """[V, Dt], the weight of its head."""
    cap: float | None = None
    bias: Tensor | None = None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    teacher: Teacher | None = None,
    share: float = 1.0,
    cap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """share * KL(teacher || student) + (1 - share) * cross entropy, in nats a token; without a teacher, cross entropy.

    With the float checkpoint as the teacher this is the self-distillation of MobileLLM-Pro (§7.1, Table 16). Logits are computed
    once here and once more in the backward pass: the products in autocast's type or else in that of the inputs, everything else in
    float32, or in float64 if an input has it.

    Args:
        hidden: [N, D], the input of the head's product: the stream after the final norm, rounded where the recipe says so.
        weight: [V, D], the head's weight, rounded likewise.
        targets: [N], int64. A token whose target is `IGNORED` counts in neither term; if none counts, the loss is 0.
        bias: [V], the head's bias, or None.
        teacher: hidden states of the same N tokens, and a head over the same vocabulary.
        share: the weight of the KL term, in [0, 1].
        cap: logits z become cap * tanh(z / cap); the teacher has a cap of its own.
        chunk: entries of the vocabulary whose logits are in memory at once.

    Raises:
        InputError: the teacher's vocabulary has another size, or a target lies outside the vocabulary.
    """
    kept = targets != IGNORED
    targets, dtype = targets[kept], _product_dtype(hidden, weight)
    _check(targets, len(weight), teacher)
    if teacher:
        teacher = teacher._replace(hidden=teacher.hidden[kept].to(dtype))
    settings = teacher, share if teacher else 0.0, cap, chunk, dtype
    return cast("Tensor", _HeadLoss.apply(hidden[kept], weight, bias, targets, *settings))  # type: ignore[no-untyped-call]


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's type where autocast is on, else that of the inputs. A custom function has to apply it itself."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check(targets: Tensor, vocabulary: int, teacher: Teacher | None) -> None:
    if teacher and len(teacher.weight) != vocabulary:
        raise InputError(
            f"the teacher's vocabulary has {len(teacher.weight)} entries, the student's {vocabulary}: "
            "take a teacher with the same tokenizer"
        )
    outside = targets[(targets < 0) | (targets >= vocabulary)]
    if len(outside):
        raise InputError(
            f"{len(outside)} of {len(targets)} targets, the first {outside[0].item()}, are outside the vocabulary of {vocabulary}: "
            f"encode the text with the model's own tokenizer; {IGNORED} leaves a token out"
        )


class _HeadLoss(torch.autograd.Function):
    """`head_loss` of tokens that all count; the teacher's hidden states must have `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teacher: Teacher | None,
        share: float,
        cap: float | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        x = hidden.to(dtype)
        log_sum = teacher_log_sum = x.new_full((len(x),), -torch.inf, dtype=_wide(dtype))
        picked, gap = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
        for rows in _chunks(len(weight), chunk):
            z = _logits(rows, x, weight, cap, bias)
            log_sum = torch.logaddexp(log_sum, z.logsumexp(1))
            inside, columns = _columns(targets, rows)
            picked += z.gather(1, columns)[:, 0] * inside
            if teacher:
                t = _logits(rows, *teacher)
                added = t.logsumexp(1)
                # The mean of t - z under the teacher's distribution, over the entries so far.
                gap = gap.lerp((t.softmax(1) * (t - z)).sum(1), (added - teacher_log_sum).sigmoid())
                teacher_log_sum = torch.logaddexp(teacher_log_sum, added)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum, teacher_log_sum)
        ctx.settings = teacher, share, cap, chunk, dtype
        loss = (1 - share) * (log_sum - picked)
        if teacher:
            loss += share * (gap + (log_sum - teacher_log_sum))
        return loss.sum() / max(1, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum, teacher_log_sum = ctx.saved_tensors
        teacher, share, cap, chunk, dtype = ctx.settings
        x, (of_hidden, of_weight, of_bias, *_) = hidden.to(dtype), ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if of_hidden else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(bias) if of_bias else None
        for rows in _chunks(len(weight), chunk):
            z = _logits(rows, x, weight, cap, bias)
            grad = (z - log_sum[:, None]).exp_()
            if teacher:
                grad -= (_logits(rows, *teacher) - teacher_log_sum[:, None]).exp_() * share
            inside, columns = _columns(targets, rows)
            grad.scatter_add_(1, columns, inside.to(grad.dtype)[:, None] * (share - 1))
            grad *= grad_loss / max(1, len(x))
            if cap is not None:
                grad *= 1 - (z / cap).square_()
            if grad_bias is not None:
                grad_bias[rows] = grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden += _product(grad, weight[rows])
            if grad_weight is not None:
                grad_weight[rows] = _product(grad.T, x)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 6


def _chunks(vocabulary: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, vocabulary)) for start in range(0, vocabulary, chunk))


def _columns(targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Which targets [N] lie in a chunk, and their columns [N, 1] in it; targets outside get an arbitrary column."""
    columns, last = targets - rows.start, rows.stop - rows.start - 1
    return (columns >= 0) & (columns <= last), columns.clamp(0, last)[:, None]


def _logits(rows: slice, x: Tensor, weight: Tensor, cap: float | None, bias: Tensor | None) -> Tensor:
    """Logits [N, chunk] of one chunk of the vocabulary, from the product in x's type."""
    z = _product(x, weight[rows].T)
    z = z.to(_wide(z.dtype))
    return softcap(z if bias is None else z + bias[rows], cap)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in a's type, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.to(a.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
