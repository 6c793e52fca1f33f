"""What `peers.py` measured, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from operator_profile import profile_table

ENGINES = {
    "xnnpack": "lobit, XNNPACK",
    "onnx": "lobit, ONNX Runtime",
    "export_llm": "export_llm",
    "export_llm_int8": "export_llm, INT8 cache",
    "llama": "llama.cpp Q4_0",
    "onnx_ternary": "lobit, ONNX Runtime, ternary",
    "llama_ternary": "llama.cpp TQ2_0",
}
RIVALS = {"xnnpack": ("export_llm", "export_llm_int8", "llama"), "onnx": ("llama",), "onnx_ternary": ("llama_ternary",)}
"""What each artifact of ours is compared with."""
NOTES = (
    "ppN: a prompt of N tokens is read at once; tgN: N tokens are read one by one; @dD: with D tokens in the cache before. "
    "Ratios: above 1 where lobit is faster; the median of the rounds' ratios, and the least and the largest.",
    "lobit and export_llm: INT4 weights and embedding in groups of 32, INT8 dynamic activations, chunks of 512, the same context, timed "
    "by the same code; loading, a first call and filling the cache are not timed. On XNNPACK lobit keeps keys and values in INT8, on ONNX "
    "Runtime in float32; export_llm in float32, its default, for which it has a faster attention, or in INT8.",
    "llama.cpp: llama-bench, everything Q4_0, its defaults (keys and values in 16 bits). It has the shape as a plain Llama: no norms "
    "of q and k, every layer sees the whole context.",
    "Ternary: two bits in the layers, embedding and head of 4 bits in groups of 32, for both; the weights are random all the same.",
    "Exports: a process of its own, its wall time, its processor time, its largest resident memory; export_llm starts from a "
    "checkpoint of its own format, whose conversion does not count.",
)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """lobit over a peer: the median of the rounds, the least and the largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]  # a failed engine has fewer rounds
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"


def speed_table(name: str, found: dict[str, Any]) -> Iterable[str]:
    """Medians of each test, tokens a second, and ours over each rival's."""
    engines = [engine for engine in ENGINES if found["missing"].get(engine) != "skipped"]
    pairs = [(ours, rival) for ours in engines for rival in RIVALS.get(ours, ()) if rival in engines]
    titles = [*(ENGINES[engine] for engine in engines), *(f"{ENGINES[ours]} / {ENGINES[rival]}" for ours, rival in pairs)]
    yield f"| {name}, tokens/s | " + " | ".join(titles) + " |"
    yield "|---" * (1 + len(titles)) + "|"
    for test, samples in found["samples"].items():
        medians = [f"{statistics.median(samples[engine]):.1f}" if engine in samples else "–" for engine in engines]
        ratios = [ratio(samples.get(ours, []), samples.get(rival, [])) for ours, rival in pairs]
        yield f"| {test} | " + " | ".join(medians + ratios) + " |"
    yield from (f"\n{ENGINES[engine]} could not be measured: {why}" for engine, why in found["missing"].items() if why != "skipped")


def export_table(models: dict[str, dict[str, Any]]) -> Iterable[str]:
    """What each export took, and how large its file is."""
    yield "| model | exporter | wall, s | processor, s (user + system) | peak memory, GB | file, MB |"
    yield "|---|---|---|---|---|---|"
    for name, found in models.items():
        for engine, size in found["files"].items():
            figures = found["exports"].get(engine)
            cost = "– | – | –"
            if figures:
                user, system, peak = (figures[key] for key in ("user_s", "system_s", "peak_rss_bytes"))
                cost = f"{figures['wall_s']:.0f} | {user + system:.0f} ({user:.0f} + {system:.0f}) | {peak / 1e9:.2f}"
            yield f"| {name} | {ENGINES[engine]} | {cost} | {size / 1e6:.0f} |"


def report(result: dict[str, Any]) -> str:
    """Everything in Markdown."""
    host, models = result["cpu"], result["models"]
    lines = [
        f"{host['name']} ({', '.join(host['instruction_sets'])}); {result['threads']} threads; {result['rounds']} rounds; context "
        f"{result['context']}; load average before the run {host['load_average']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + result["llama"]
    ]
    for name, found in models.items():
        lines += ["", *speed_table(name, found)]
    lines += ["", *export_table(models)]
    for name, found in models.items():
        if found["profile"]:
            title = f"Where the time goes on XNNPACK, {name}, depth 0, ExecuTorch's profiler on:"
            lines += ["", title, "", *profile_table(found["profile"])]
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)]) + "\n"
