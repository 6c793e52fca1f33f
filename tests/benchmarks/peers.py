"""lobit's artifacts beside ExecuTorch's own exporter and llama.cpp, on the same shapes, in one run: `make bench`.

    python tests/benchmarks/peers.py [--models m125,pro1b] [--work bench-out] [--rounds 5] [--skip llama,profile] [--out FILE]

Models (random weights of a named shape), artifacts and what they cost to make are kept in --work: a run that was stopped goes on
from there. lobit's artifacts are made anew where its sources have changed. Speeds are measured anew in every run: in each round and at
each depth the runtimes take turns, one sample of every test each in a fresh process; medians, and ratios of the same round.
Writes a Markdown table to stdout and --out, every sample to --json. A peer that cannot be had is named with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("LOBIT_SHARED") or ROOT.parent / "shared").resolve()
sys.path[:0] = [str(ROOT), str(HERE)]  # lobit need not be installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from operator_profile import numbers  # noqa: E402
from peers_table import ENGINES, report  # noqa: E402

from lobit.runtime.bundle import open_bundle  # noqa: E402
from lobit.runtime.host import cpu, usable_cores  # noqa: E402

CHUNK = 512
PROFILE = (sys.executable, str(HERE / "operator_profile.py"))
OURS = {
    "xnnpack": ("xnnpack", "--recipe", "8da4w-g32"),
    "onnx": ("onnx", "--recipe", "8da4w-g32"),
    "onnx_ternary": ("onnx", "--recipe", "bitnet", "--mixed", "embedding=int4:32", "--mixed", "head=int4:32"),
}
"""Target and recipe."""
QUANTIZED = {"llama": "q4_0", "llama_ternary": "tq2_0"}
"""llama.cpp's type of the layers' matrices; embedding and head are Q4_0."""
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
PARAMETERS = {
    **{"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"},
    **{"head_dim": "head_dim", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size"},
    **{"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"},
}
"""export_llm's params.json and Hugging Face's config.json."""
LLAMA_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LAYER_NAMES = {
    **{"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo"},
    **{"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"},
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
}
"""Names of weights in Hugging Face's Llamas and in export_llm's."""

Figures = dict[str, Any]
"""Of a making: `wall_s`, `user_s`, `system_s`, `peak_rss_bytes`."""
Samples = dict[str, dict[str, list[float]]]
"""test -> engine -> tokens a second, one of each round"""


class UnavailableError(Exception):
    """A peer cannot be had here; the message says why."""


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def measured(command: list[str], folder: Path, log: Path) -> Figures:
    """Runs a command in a folder and measures it.

    Raises:
        UnavailableError: it failed.
    """
    say(f"  {' '.join(command[:4])} … (log: {log})")
    start = perf_counter()
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        _, status, usage = os.wait4(child.pid, 0)
    wall, child.returncode = perf_counter() - start, os.waitstatus_to_exitcode(status)
    if child.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UnavailableError(f"exit code {child.returncode}: {' '.join(last)[:200]}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss << 10
    return {"wall_s": wall, "user_s": usage.ru_utime, "system_s": usage.ru_stime, "peak_rss_bytes": peak}


def output(command: list[str], **environment: str) -> str:
    """What a command prints.

    Raises:
        UnavailableError: it is absent, or it failed.
    """
    try:
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise UnavailableError(str(error)) from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        raise UnavailableError(f"{Path(command[0]).name}: exit code {error.returncode}: {' '.join(last)[:200]}") from None


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """A path that appears when it is whole: `make` is given a name beside it."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        say(f"making {path}")
        make(partial)
        partial.rename(path)
    return path


def tool(name: str) -> str:
    """A script of the shared folder.

    Raises:
        UnavailableError: the folder is not there.
    """
    path = SHARED / "tools" / name
    if not path.is_file():
        raise UnavailableError(f"no {path}: set LOBIT_SHARED")
    return str(path)


def model_folder(name: str, work: Path) -> Path:
    """A random model of a named shape, as a Hugging Face folder."""
    return once(work / "models" / name, lambda out: output([sys.executable, tool("make_model.py"), name, str(out)]))


def lobit_bundle(engine: str, model: Path, work: Path, context: int) -> tuple[Path, Figures]:
    """lobit's artifact, made anew where a source file or an option is another than when it was made."""
    target, *recipe = OURS[engine]
    sources = sorted(path for part in ("lobit", "quant_recipes", "export", "runtime") for path in (ROOT / part).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + f"{context} {recipe}".encode()).hexdigest()
    bundle, kept = work / engine / model.name, work / engine / f"{model.name}.json"
    figures: Figures = json.loads(kept.read_text()) if kept.is_file() and bundle.is_dir() else {}
    if figures.get("sources") != digest:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)
        for old in (bundle, bundle.with_name(f"{bundle.name}.partial")):  # an export that goes on would take less
            shutil.rmtree(old, ignore_errors=True)
        say(f"making {bundle}")
        command = [sys.executable, "-m", "lobit.cli", "export", str(model), *recipe, "--target", target]
        command += ["--context", str(context), "--chunk", str(CHUNK), "-o", str(bundle)]
        figures = measured(command, ROOT, kept.with_suffix(".log")) | {"sources": digest}
        kept.write_text(json.dumps(figures))
    return bundle / "model.pte" if target == "xnnpack" else bundle, figures


def export_llm_program(engine: str, model: Path, work: Path, context: int) -> tuple[Path, Figures]:
    """ExecuTorch's own export of the same shape and weights, with what it cost."""
    int8 = engine == "export_llm_int8"

    def make(folder: Path) -> None:
        folder.mkdir()
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory here would count as the exporter's
            pool.apply(write_checkpoint, (model, folder))
        command = [sys.executable, "-m", "executorch.extension.llm.export.export_llm", *export_llm_options(model, context, int8)]
        figures = measured(command, folder, folder.with_name(model.name + ".log"))
        (folder / "checkpoint.pth").unlink()
        (folder / "figures.json").write_text(json.dumps(figures))

    folder = once(work / engine / model.name, make)
    return folder / "model.pte", json.loads((folder / "figures.json").read_text())


def export_llm_options(model: Path, context: int, int8: bool) -> list[str]:
    """Everything that it has for this: its attention and cache operators, rings where the model has windows."""
    config = json.loads((model / "config.json").read_text())
    windows = [config["sliding_window"] if kind == "sliding_attention" else 0 for kind in config.get("layer_types") or []]
    return [
        *("base.model_class=llama3", "base.params=params.json", "base.checkpoint=checkpoint.pth"),
        *("model.use_kv_cache=True", "model.use_sdpa_with_kv_cache=True", f"model.quantize_kv_cache={int8}"),
        *(["model.local_global_attention=[" + ",".join(map(str, windows)) + "]"] if any(windows) else []),
        *("quantization.qmode=8da4w", "quantization.group_size=32", "quantization.embedding_quantize='4,32'"),
        "quantization.use_hqq=False",  # a search for better scales, which changes no speed and which lobit does not make
        *("backend.xnnpack.enabled=True", "backend.xnnpack.extended_ops=True", "model.enable_dynamic_shape=True"),
        f"export.max_seq_length={CHUNK + 1}",  # it takes calls of one token less
        *(f"export.max_context_length={context}", "export.output_name=model.pte"),
        *("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"),
    ]


def write_checkpoint(model: Path, folder: Path) -> None:
    """params.json and checkpoint.pth, as export_llm reads them; a tied head is stored again, for it has no tied product."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    params = {theirs: config[ours] for theirs, ours in PARAMETERS.items()}
    if config.get("use_qk_norm"):
        params |= {"use_qk_norm": True, "qk_norm_affine": False}
    weights = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        parts = name.removesuffix(".weight").split(".")
        if parts[-1] in ("q_proj", "k_proj") and config["model_type"] == "llama":  # halves of a rotated pair become neighbours
            tensor = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2)).transpose(1, 2).reshape(tensor.shape).contiguous()
        known = LLAMA_NAMES.get(".".join(parts))
        weights[f"{known or f'layers.{parts[2]}.{LAYER_NAMES[parts[-1]]}'}.weight"] = tensor
    weights.setdefault("output.weight", weights["tok_embeddings.weight"].clone())
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(weights, folder / "checkpoint.pth")


def build_llama(folder: Path, flags: str = "") -> Path:
    """llama.cpp's programs, built where they are not yet."""
    if not (folder / "bin" / "llama-bench").exists():
        say(f"building llama.cpp in {folder}: about ten minutes")
        output(["bash", tool("build_llama_cpp.sh"), str(folder)], CFLAGS=flags, CXXFLAGS=flags)
    return folder / "bin"


def llama_file(engine: str, model: Path, given: argparse.Namespace) -> tuple[Path, Figures]:
    """The shape in llama.cpp's format; `given.llama` becomes a build that runs here."""
    kind = QUANTIZED[engine]
    programs = build_llama(given.llama)
    package = next(iter(given.llama.glob("llama_cpp_python-*/vendor/llama.cpp/gguf-py")), Path())

    def make(path: Path) -> None:
        floats = path.with_name(f"{model.name}-f16.gguf")
        output([sys.executable, tool("hf_to_gguf.py"), str(model), str(floats)], PYTHONPATH=str(package))
        ends = ["--pure", "--token-embedding-type", "q4_0", "--output-tensor-type", "q4_0"]
        output([str(programs / "llama-quantize"), *ends, str(floats), str(path), kind.upper()])
        floats.unlink()

    path = once(given.work / "gguf" / f"{model.name}-{kind}.gguf", make)
    try:
        output([str(programs / "llama-bench"), "-m", str(path), "-p", "32", "-n", "0", "-r", "1"])
    except UnavailableError as error:
        if given.llama.name.endswith("-no-amx"):
            raise
        say(f"  {error}; some virtual machines name AMX among their instructions and do not run it")
        given.llama = given.llama.with_name(given.llama.name + "-no-amx")
        build_llama(given.llama, NO_AMX)
    return path, {}


def size_of(path: Path) -> int:
    """Bytes of a file, or of a bundle's program."""
    return open_bundle(path, hashes=False).manifest.program_bytes if path.is_dir() else path.stat().st_size


def speeds(engine: str, path: Path, given: argparse.Namespace, depth: int) -> dict[str, float]:
    """Tokens a second of each test at a depth, one sample each, from a fresh process."""
    options = ["-p", ",".join(map(str, given.prompts)), "-n", str(given.generate), "-d", str(depth), "-t", str(given.threads)]
    if engine not in QUANTIZED:
        return dict(json.loads(output([*PROFILE, str(path), "--speeds", "--json", *options])))
    rows = json.loads(output([str(given.llama / "bin" / "llama-bench"), "-m", str(path), "-r", "1", "-o", "json", *options]))
    return {f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": row["avg_ts"] for row in rows}


def measure(paths: dict[str, Path], given: argparse.Namespace, missing: dict[str, str]) -> Samples:
    """All rounds of a model. An engine that fails is dropped, with the reason in `missing`."""
    samples: Samples = {}
    for number in range(given.rounds):
        for depth in given.depths:
            for engine in [engine for engine in paths if engine not in missing]:
                say(f"  round {number + 1} of {given.rounds}, depth {depth}: {engine}")
                try:
                    found = speeds(engine, paths[engine], given, depth)
                except UnavailableError as error:
                    missing[engine] = str(error)
                    continue
                for test, speed in found.items():
                    samples.setdefault(test + (f"@d{depth}" if depth else ""), {}).setdefault(engine, []).append(speed)
    return samples


def run_model(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape: `{"exports", "files", "missing", "samples", "profile"}`."""
    model = model_folder(name, given.work)

    def make(engine: str) -> tuple[Path, Figures]:
        if engine in OURS:
            return lobit_bundle(engine, model, given.work, given.context)
        return llama_file(engine, model, given) if engine in QUANTIZED else export_llm_program(engine, model, given.work, given.context)

    paths, exports, missing = {}, {}, dict.fromkeys(given.skip, "skipped")
    for engine in [engine for engine in ENGINES if engine not in given.skip]:
        try:
            paths[engine], exports[engine] = make(engine)
        except UnavailableError as error:
            missing[engine] = str(error)
    profile = {}
    if "xnnpack" in paths and "profile" not in given.skip:
        command = [*PROFILE, str(paths["xnnpack"]), "--json", "-p", str(max(given.prompts))]
        profile = json.loads(output([*command, "-n", str(given.generate), "-t", str(given.threads)]))
    return {
        "exports": exports,
        "files": {engine: size_of(path) for engine, path in paths.items()},
        "samples": measure(paths, given, missing),
        "profile": profile,
        "missing": missing,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--models", type=names, default=["m125", "pro1b"], help="shapes of make_model.py")
    parser.add_argument("--work", type=Path, default=Path("bench-out"), help="where models and artifacts are kept")
    parser.add_argument("--llama", type=Path, help="where llama.cpp is built, or to be built; default: WORK/llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", type=names, default=["export_llm_int8"], help=f"of {', '.join([*ENGINES, 'profile'])}")
    parser.add_argument("--prompts", type=numbers, default=[128, 512])
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--depths", type=numbers, default=[0, 2048])
    parser.add_argument("--context", type=int, default=4096, help="of both exports")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, help="the table's file")
    parser.add_argument("--json", type=Path, help="every sample")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.llama = (given.llama or given.work / "llama").resolve()
    return given


def main() -> int:
    """Makes, measures, prints; what is measured is written after every model."""
    given = parse()
    result: dict[str, Any] = {key: getattr(given, key) for key in ("threads", "rounds", "context")}
    result |= {"cpu": cpu(), "versions": {name: metadata.version(name) for name in ("executorch", "onnxruntime", "torch")}, "models": {}}
    for name in given.models:
        say(name)
        try:
            result["models"][name] = run_model(name, given)
        except UnavailableError as error:
            print(f"peers: {name}: {error}", file=sys.stderr)
            return 2
        result["llama"] = "; llama.cpp built without AMX, which crashes here" if given.llama.name.endswith("-no-amx") else ""
        for path, text in ((given.out, report(result)), (given.json, json.dumps(result, indent=1))):
            if path:
                path.write_text(text, encoding="utf-8")
    print(report(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
