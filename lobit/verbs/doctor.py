"""Tells what is installed, and whether lobit reads a model's folder as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lobit.errors import reason
from lobit.quiet import quiet_python
from lobit.targets import TARGETS

if TYPE_CHECKING:
    from torch import Tensor

    from lobit.model import Transformer
    from lobit.tokenizer import Tokenizer

PARTS = {
    "lobit": ("torch", "safetensors", "tokenizers", "huggingface_hub"),
    **{name: target.packages for name, target in TARGETS.items()},
    "fetch": ("gguf",),
}
"""Packages that the core, each target, and `lobit fetch` need."""
SENTENCE = "The capital of France is Paris. 2 + 2 = 4, isn't it?\n"
"""The text that lobit and transformers both read."""
MESSAGES = [{"role": "user", "content": "Name the capital of France."}]
OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options for transformers: nothing is fetched, and code in the folder is neither run nor asked about."""
FAR = 1e-3
"""How far apart logits may be, in standard deviations of theirs: float32 products in another order move them by less than 1e-5 of one."""
ROUNDED = 2
"""How far apart logits of ternary models may be once lobit rounds inputs as transformers does, as a multiple of what that rounding moves.
In small models they are the same but for single inputs on a rounding boundary; in deep ones ever more inputs fall over one, until both
sides have moved as far, each its own way."""


def doctor(what: str | None = None) -> dict[str, Any]:
    """What is installed and what is missing; or whether a model's folder is read as transformers reads it.

    Args:
        what: a target, `fetch`, `android`, or a model; None: all Python packages.

    Returns:
        `{"parts": [{"for", "part", "found", "way_out"}], "passed"}`; `found` is a version or a number of cores, None where
        the part is missing. For a model: what `check_model` returns.

    Raises:
        ModelError: `what` is neither a target nor a model.
    """
    from importlib import metadata

    from lobit.errors import ModelError
    from lobit.runtime.host import usable_cores

    if what == "android":
        return _android()
    if what is not None and what not in PARTS:
        if not (Path(what).exists() or what == "demo" or "/" in what):
            targets = ", ".join([*(name for name in PARTS if name != "lobit"), "android"])
            raise ModelError(f"{what!r} is no model and no target: give a model's folder, or one of {targets}")
        return check_model(what)
    rows: list[dict[str, Any]] = []
    for name in ("lobit", what) if what else PARTS:
        extra = "" if name == "lobit" else f"[{name}]"
        for package in PARTS[name]:
            try:
                found: str | None = metadata.version(package)
            except metadata.PackageNotFoundError:
                found = None
            way_out, needed = f"pip install 'lobit{extra}'", TARGETS[name].exact.get(package) if name in TARGETS else None
            if found and needed and found != needed:
                way_out, found = f"{found} is installed and does not work: pip install {package}=={needed}", None
            rows.append({"for": name, "part": package, "found": found, "way_out": way_out})
    rows.append({"for": "lobit", "part": "processor cores", "found": str(usable_cores()), "way_out": ""})
    return {"parts": rows, "passed": all(row["found"] for row in rows)}


def _android() -> dict[str, Any]:
    """The programs and packages that building the app, emulated engines and phones need."""
    import shutil
    from importlib.util import find_spec

    from lobit.android.artifacts import install_command, missing_programs, programs

    rows: list[dict[str, Any]] = []
    for program in programs():
        told = {"for": f"android, {program.use}", "part": program.name, "found": shutil.which(program.name)}
        rows.append({**told, "way_out": install_command([program])})
    elf = None if find_spec("elftools") is None else "installed"
    rows.append({"for": "android, native", "part": "pyelftools", "found": elf, "way_out": "pip install 'lobit[android]'"})
    if missing := missing_programs():
        rows.append({"for": "android", "part": "all that is missing", "found": None, "way_out": install_command(missing)})
    return {"parts": rows, "passed": all(row["found"] for row in rows)}


def check_model(model: str) -> dict[str, Any]:
    """Reads a float model's folder with transformers too, and compares tokens of a text, a chat, stop tokens and the last logits.

    `verify` and `parity` compare what lobit read with what lobit made of it; this finds what lobit reads wrongly. Nothing in the folder is
    executed.

    Returns:
        `{"model", "checks": [{"what", "ours", "theirs", "same"}], "passed"}`; `same` is None where transformers gives nothing to compare.

    Raises:
        MissingPartError: transformers is not installed.
        ModelError: lobit cannot read the model.
    """
    import importlib.util

    from lobit.checkpoint import load_config, resolve
    from lobit.errors import MissingPartError
    from lobit.quant_recipes.quantized import check_float
    from lobit.tokenizer import Tokenizer
    from lobit.tokenizer_files import FILE_NAME

    if importlib.util.find_spec("transformers") is None:
        raise MissingPartError("transformers is not installed, with which a model is read once more: pip install transformers")
    source = resolve(model)
    check_float(source)
    config = load_config(source)
    checks, ids = [], list(range(1, min(32, config.vocab_size, config.max_context)))
    with quiet_python():
        import transformers

        logging: Any = transformers.utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if (source / FILE_NAME).is_file():
            tokenizer = Tokenizer.from_folder(source, config.vocab_size)
            checks += _compare_tokenizers(source, tokenizer)
            ids = tokenizer.encode(SENTENCE)[: config.max_context]
        checks.append(_compare_logits(source, ids))
    return {"model": model, "checks": checks, "passed": all(check["same"] is not False for check in checks)}


def _compare_tokenizers(source: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Compares the tokens of a sentence, a chat with its tokens, and the stop tokens."""
    from transformers import AutoTokenizer, GenerationConfig

    what, ours = "tokens of a sentence", tokenizer.encode(SENTENCE)
    try:
        theirs = AutoTokenizer.from_pretrained(source, **OFFLINE)
        checks = [_check(what, ours, theirs(SENTENCE)["input_ids"])]
    except Exception as error:  # transformers raises many kinds; what it cannot read is not compared
        return [_unread(what, ours, reason(error))]
    if tokenizer.chat_template or theirs.chat_template:
        text = tokenizer.render_chat(MESSAGES) if tokenizer.chat_template else "none"
        chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) if theirs.chat_template else "none"
        checks += [
            _check("a chat in the template", text, chat),
            _check("tokens of the chat", tokenizer.encode(text, bos=False), theirs(chat, add_special_tokens=False)["input_ids"]),
        ]
    try:
        stops = GenerationConfig.from_pretrained(source, local_files_only=True).eos_token_id
    except OSError:  # the folder has no generation_config.json
        stops = theirs.eos_token_id
    wanted = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    return [*checks, {**_check("stop tokens", tokenizer.stop, sorted(wanted)), "same": wanted <= set(tokenizer.stop)}]


def _compare_logits(source: Path, ids: list[int]) -> dict[str, Any]:
    """Compares the logits after a short text."""
    import torch
    from transformers import AutoModelForCausalLM

    from lobit.checkpoint import load_config, load_model

    what, tokens = f"logits after {len(ids)} tokens", torch.tensor([ids])
    with torch.inference_mode():
        model = load_model(source)
        ours = model(tokens)[0, -1]
        try:
            options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
            other, loaded = cast(Any, AutoModelForCausalLM).from_pretrained(source, **options, **OFFLINE)
            left = len(loaded["missing_keys"]) + len(loaded["unexpected_keys"]) + len(loaded["mismatched_keys"])
            if left:
                return _unread(what, _largest(ours), f"{left} tensors are missing, or none that it knows")
            theirs = other(tokens).logits[0, -1]
        except Exception as error:  # as above
            return _unread(what, _largest(ours), reason(error))
    far = float((ours - theirs).abs().max() / theirs.std())
    check = {**_check(what, _largest(ours), _largest(theirs)), "same": far <= FAR, "apart": far}
    if far > FAR and load_config(source).ternary != "none":
        # transformers does so where accelerate is installed, and refuses the folder where it is not.
        rounded = _with_rounded_inputs(model, tokens)
        if (rounded - theirs).abs().max() <= ROUNDED * (rounded - ours).abs().max():
            told = "transformers rounds the inputs of ternary products to INT8, which the float model does not"
            return {**check, "theirs": told, "same": None}
    return check


def _with_rounded_inputs(model: Transformer, tokens: Tensor) -> Tensor:
    """The logits [V] after tokens [1, T] if the input of each product of a block is rounded to INT8 by its largest magnitude."""
    import torch

    from lobit.quant_recipes.grid import fake_quantize_tokens
    from lobit.runtime.reference import LINEARS

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            module.register_forward_pre_hook(lambda _, inputs: (fake_quantize_tokens(inputs[0], "absmax"),))
    with torch.inference_mode():
        last: Tensor = model(tokens)[0, -1]
    return last


def _largest(logits: Tensor) -> str:
    """The most probable tokens with their logits."""
    values, tokens = logits.topk(3)
    return ", ".join(f"{token} ({value:.4f})" for value, token in zip(values.tolist(), tokens.tolist(), strict=True))


def _check(what: str, ours: object, theirs: object) -> dict[str, Any]:
    return {"what": what, "ours": ours, "theirs": theirs, "same": ours == theirs}


def _unread(what: str, ours: object, why: str) -> dict[str, Any]:
    """A check for which transformers gives nothing to compare."""
    return {"what": what, "ours": ours, "theirs": f"transformers cannot read it ({why})", "same": None}
