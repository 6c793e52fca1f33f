"""The loss of a student's head is that of torch on all logits, at once or in chunks, without their memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lobit.errors import InputError
from lobit.quant_recipes.distill import CHUNK, IGNORED, Teacher, head_loss

TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-6}}
caps = st.none() | st.floats(1, 30)
pytestmark = pytest.mark.usefixtures("one_thread")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def random_targets(seed: int, tokens: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def plain_logits(hidden: Tensor, weight: Tensor, cap: float | None = None, bias: Tensor | None = None) -> Tensor:
    z = F.linear(hidden, weight, bias)
    return z if cap is None else cap * torch.tanh(z / cap)


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    teacher: Teacher | None = None,
    share: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """The same with torch's losses on all logits."""
    z = plain_logits(hidden, weight, cap, bias)
    cross_entropy = F.cross_entropy(z, targets)
    if teacher is None:
        return cross_entropy
    student, reference = (logits[targets != IGNORED].log_softmax(1) for logits in (z, plain_logits(*teacher).detach()))
    return share * F.kl_div(student, reference, log_target=True, reduction="batchmean") + (1 - share) * cross_entropy


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """The loss, and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None])]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(data=st.data(), seed=st.integers(0, 2**31), tokens=st.integers(1, 9), vocabulary=st.integers(1, 40), width=st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_values_and_gradients_are_those_of_torch_on_all_logits(
    dtype: torch.dtype, data: st.DataObject, seed: int, tokens: int, vocabulary: int, width: int
) -> None:
    hidden, weight = random(seed, tokens, width, dtype=dtype), random(seed + 1, vocabulary, width, dtype=dtype)
    bias = random(seed + 2, vocabulary, dtype=dtype) if data.draw(st.booleans(), "bias") else None
    targets = random_targets(seed, tokens, vocabulary)
    targets[torch.tensor([False, *data.draw(st.lists(st.booleans(), min_size=tokens - 1, max_size=tokens - 1), "ignored")])] = IGNORED
    options: dict[str, Any] = {"bias": bias, "cap": data.draw(caps, "cap"), "share": data.draw(st.floats(0, 1), "share")}
    if data.draw(st.booleans(), "teacher"):
        other = data.draw(st.integers(1, 6), "teacher's width")
        taught, head = random(seed + 3, tokens, other, dtype=dtype), random(seed + 4, vocabulary, other, dtype=dtype)
        options["teacher"] = Teacher(taught, head, data.draw(caps, "teacher's cap"), None if bias is None else bias.detach() / 2)
    ours = head_loss(hidden, weight, targets, **options, chunk=data.draw(st.integers(1, vocabulary + 1), "chunk"))
    theirs = plain_loss(hidden, weight, targets, **options)
    for mine, expected in zip(gradients(ours, hidden, weight, bias), gradients(theirs, hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("vocabulary", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_the_default_chunk_serves_every_vocabulary(vocabulary: int) -> None:
    hidden, weight, targets = random(0, 3, 4), random(1, vocabulary, 4), torch.tensor([0, vocabulary - 1, vocabulary - 2])
    options: dict[str, Any] = {"teacher": Teacher(random(2, 3, 4), random(3, vocabulary, 4)), "share": 0.5}
    ours, theirs = (gradients(loss(hidden, weight, targets, **options), hidden, weight) for loss in (head_loss, plain_loss))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("share", [None, 0.3, 1.0])
def test_gradients_are_those_of_finite_differences(cap: float | None, share: float | None) -> None:
    teacher = None if share is None else Teacher(random(0, 4, 2).detach(), random(1, 7, 2).detach(), 3.0)
    targets = torch.tensor([6, IGNORED, 0, 3])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head_loss(hidden, weight, targets, bias=bias, teacher=teacher, share=share or 0.0, cap=cap, chunk=3)

    assert torch.autograd.gradcheck(loss, (random(2, 4, 3), random(3, 7, 3), random(4, 7)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_model_is_its_own_teacher_without_loss_or_gradient(cap: float | None, dtype: torch.dtype, autocast: bool) -> None:
    hidden, weight, targets = random(0, 8, 16, dtype=dtype), random(1, 50, 16, dtype=dtype), random_targets(2, 8, 50)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = head_loss(hidden, weight, targets, teacher=Teacher(hidden, weight, cap), cap=cap, chunk=7)
    assert all(not tensor.any() for tensor in gradients(loss, hidden, weight))


def test_tokens_without_a_target_change_nothing() -> None:
    hidden, weight, targets = random(0, 6, 4), random(1, 20, 4), random_targets(2, 6, 20)
    teacher, kept = Teacher(random(3, 6, 4).detach(), random(4, 20, 4).detach()), [0, 2, 5]
    targets[[1, 3, 4]] = IGNORED
    with torch.no_grad():
        hidden[1], teacher.hidden[3] = torch.nan, torch.inf
    loss, of_hidden, of_weight = gradients(head_loss(hidden, weight, targets, teacher=teacher, share=0.5), hidden, weight)
    assert not of_hidden[[1, 3, 4]].any()
    fewer = head_loss(hidden[kept], weight, targets[kept], teacher=teacher._replace(hidden=teacher.hidden[kept]), share=0.5)
    for mine, expected in zip((loss, of_hidden[kept], of_weight), gradients(fewer, hidden, weight), strict=True):
        torch.testing.assert_close(mine, expected[kept] if expected.shape == hidden.shape else expected)


def test_where_no_token_counts_the_loss_and_its_gradients_are_0() -> None:
    hidden, weight, targets = random(0, 3, 4), random(1, 20, 4), torch.full((3,), IGNORED)
    for teacher in (None, Teacher(random(2, 3, 4), random(3, 20, 4))):
        found = gradients(head_loss(hidden, weight, targets, teacher=teacher, share=0.5), hidden, weight)
        assert all(not tensor.any() for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_logits_of_ten_thousand_stay_finite(dtype: torch.dtype, cap: float | None) -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, 1.0, -1.0]]).T
    weight = (1e4 * signs).to(dtype).requires_grad_()
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.5, 0.25]], dtype=dtype).requires_grad_()
    options: dict[str, Any] = {"teacher": Teacher(-hidden.detach(), weight.detach(), cap), "share": 0.5, "cap": cap}
    targets = torch.tensor([0, 0, 4])
    found = gradients(head_loss(hidden, weight, targets, **options, chunk=2), hidden, weight)
    assert all(tensor.isfinite().all() for tensor in found)
    wide = {**options, "teacher": Teacher(-hidden.detach().float(), weight.detach().float(), cap)}
    torch.testing.assert_close(found[0], plain_loss(hidden.float(), weight.float(), targets, **wide).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_computes_the_products_in_its_type(dtype: torch.dtype, backward_inside: bool) -> None:
    hidden, weight, targets = random(0, 32, 64, dtype=torch.float32), random(1, 300, 64, dtype=torch.float32), random_targets(2, 32, 300)
    teacher = Teacher(hidden.detach() + 0.3 * random(3, 32, 64, dtype=torch.float32).detach(), weight.detach())
    options: dict[str, Any] = {"teacher": teacher, "share": 0.7, "cap": 30.0, "chunk": 128}
    with torch.autocast("cpu", dtype):
        loss = head_loss(hidden, weight, targets, **options)
        found = gradients(loss, hidden, weight) if backward_inside else []
    found = found or gradients(loss, hidden, weight)
    assert all(tensor.dtype == torch.float32 for tensor in found)

    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    in_type = gradients(head_loss(*rounded, targets, **options), *rounded)
    assert torch.equal(found[0], in_type[0])
    assert all(torch.equal(mine.to(dtype), expected) for mine, expected in zip(found[1:], in_type[1:], strict=True))

    for mine, expected in zip(found, gradients(head_loss(hidden, weight, targets, **options), hidden, weight), strict=True):
        assert (mine - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_input_may_be_the_only_one_that_is_trained(trained: str) -> None:
    tensors = {"hidden": random(0, 5, 4), "weight": random(1, 11, 4), "bias": random(2, 11)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    options: dict[str, Any] = {"targets": random_targets(3, 5, 11), "teacher": Teacher(random(4, 5, 4), random(5, 11, 4)), "share": 0.5}
    ours = gradients(head_loss(**tensors, **options, chunk=4), tensors[trained])
    torch.testing.assert_close(ours, gradients(plain_loss(**tensors, **options), tensors[trained]))


def test_no_gradient_reaches_the_teacher() -> None:
    hidden, weight, teacher = random(0, 5, 4), random(1, 11, 4), Teacher(random(2, 5, 4), random(3, 11, 4))
    head_loss(hidden, weight, random_targets(4, 5, 11), teacher=teacher).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert teacher.hidden.grad is None and teacher.weight.grad is None


def test_a_tied_and_rounded_weight_gets_both_its_gradients() -> None:
    weight, targets = random(0, 23, 4), random_targets(1, 6, 23)
    found = []
    for loss in (head_loss, plain_loss):
        rounded = weight + (weight.round() - weight).detach()
        found.append(gradients(loss(rounded[targets.flip(0)].tanh(), rounded, targets) * 3, weight))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("targets", "teacher_vocabulary", "reason"),
    [
        ([0, 11, IGNORED], 11, "1 of 2 targets, the first 11, are outside the vocabulary of 11"),
        ([-1, 12, 3], 11, "2 of 3 targets, the first -1"),
        ([0, 1, 2], 12, "the teacher's vocabulary has 12 entries, the student's 11"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused(targets: list[int], teacher_vocabulary: int, reason: str) -> None:
    teacher = Teacher(random(0, 3, 4), random(1, teacher_vocabulary, 4))
    with pytest.raises(InputError, match=reason):
        head_loss(random(2, 3, 4), random(3, 11, 4), torch.tensor(targets), teacher=teacher)


MEMORY = """
import torch
from lobit.memory import peak_rss_bytes
from lobit.quant_recipes.distill import Teacher, head_loss

torch.set_num_threads(1)
hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(50_000, 16, requires_grad=True)
teacher, targets = Teacher(torch.randn(512, 16), torch.randn(50_000, 16)), torch.randint(50_000, (512,))

def needed(entries, chunk):
    before = peak_rss_bytes()
    part = teacher._replace(weight=teacher.weight[:entries])
    torch.autograd.grad(head_loss(hidden, weight[:entries], targets % entries, teacher=part, chunk=chunk), (hidden, weight))
    return peak_rss_bytes() - before

needed(100, 100)
print(needed(50_000, 2_000), needed(50_000, 50_000))
"""


def test_chunks_need_a_fraction_of_the_memory_of_all_logits(another_process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed
    chunks, whole = map(int, another_process(MEMORY, environment=at_once).stdout.split())
    logits = 512 * 50_000 * 4
    assert chunks < logits / 3 < logits < whole
