"""What the chunked loss saves: its time and memory beside torch's losses on all logits, for the vocabulary of MobileLLM-Pro.

    python tests/benchmarks/distillation.py [--tokens 512] [--vocabulary 202048] [--hidden 1280] [--chunks 2048,4096,8192]
        [--type float32 | bfloat16] [--rounds 3] [--threads 1]

Prints one row per way of computing KL(teacher || student), half-and-half with cross entropy, and the gradients of hidden states and
head: the median seconds of a forward and backward pass after one that is not timed, each way in a process of its own, and the peak
memory above the inputs. The gradients' own size is part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.memory import peak_rss_bytes
from lobit.quant_recipes.distill import Teacher, head_loss

FULL = "full"
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives back what is freed, so that the peak is what was held."""


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Teacher) -> Tensor:
    """Half KL, half cross entropy, with torch's losses on all logits in float32."""
    z = F.linear(hidden, weight).float()
    with torch.no_grad():
        reference = F.linear(teacher.hidden, teacher.weight).float().log_softmax(1)
    return (F.kl_div(z.log_softmax(1), reference, log_target=True, reduction="batchmean") + F.cross_entropy(z, targets)) / 2


def measure(way: str, arguments: argparse.Namespace) -> tuple[float, int]:
    """Median seconds, and the bytes by which the peak rose above the inputs."""
    torch.set_num_threads(arguments.threads)
    n, v, d = arguments.tokens, arguments.vocabulary, arguments.hidden
    hidden, weight = torch.randn(n, d, requires_grad=True), (torch.randn(v, d).div_(d**0.5)).requires_grad_()
    teacher = Teacher(hidden.detach() + 0.1 * torch.randn(n, d), weight.detach())
    targets, seconds, before = torch.randint(v, (n,)), [], peak_rss_bytes()
    for _ in range(1 + arguments.rounds):
        start = perf_counter()
        with torch.autocast("cpu", getattr(torch, arguments.type), enabled=arguments.type != "float32"):
            if way == FULL:
                loss = full_loss(hidden, weight, targets, teacher)
            else:
                loss = head_loss(hidden, weight, targets, teacher=teacher, share=0.5, chunk=int(way))
        torch.autograd.grad(loss, (hidden, weight))
        seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:]), peak_rss_bytes() - before


def main() -> None:
    """Measures each way in a process of its own and prints a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=202_048)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--chunks", default="2048,4096,8192")
    parser.add_argument("--type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(*measure(arguments.way, arguments))
        return
    print(f"{'logits':12} {'seconds':>8} {'peak MiB':>9}")
    for way in (FULL, *arguments.chunks.split(",")):
        command = [sys.executable, *sys.argv, "--way", way]
        result = subprocess.run(command, check=True, env=os.environ | AT_ONCE, stdout=subprocess.PIPE, text=True)
        seconds, peak = result.stdout.split()
        print(f"{way if way == FULL else f'chunk {way}':12} {float(seconds):8.2f} {int(peak) / 2**20:9.0f}", flush=True)


if __name__ == "__main__":
    main()
