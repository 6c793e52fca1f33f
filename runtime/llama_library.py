"""llama.cpp's C functions, out of the shared object in the package `xllamacpp`.

The structures are those of exactly `VERSION` (`thirdparty/llama.cpp/include/llama.h` in its source distribution): another version
has other fields in them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from lobit.errors import LobitError, MissingPartError
from lobit.targets import TARGETS

PACKAGE = "xllamacpp"
VERSION = TARGETS["gguf"].exact[PACKAGE]
"""The version whose structures these are."""
NO_FLASH = 0
"""Attention by plain products: the fused kernel for CPUs adds values up in half precision."""
READ_WHOLE = 0
"""The file is read into memory. Mapped, a file that is too short would end the process with a signal."""


class ModelParameters(Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class Override(Structure):
    """`llama_model_kv_override` with a text; the array ends with one without a key."""

    _fields_ = (("tag", c_int32), ("key", c_char * 128), ("filled_up", c_int32), ("val_str", c_char * 128))


TEXT = 3
"""`LLAMA_KV_OVERRIDE_TYPE_STR`."""


class ContextParameters(Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Function(NamedTuple):
    """A function of the library: its result and arguments."""

    result: Any
    arguments: tuple[Any, ...]


FUNCTIONS = {
    "llama_log_set": Function(None, (c_void_p, c_void_p)),
    "llama_backend_init": Function(None, ()),
    "llama_model_default_params": Function(ModelParameters, ()),
    "llama_context_default_params": Function(ContextParameters, ()),
    "llama_model_load_from_file": Function(c_void_p, (c_char_p, ModelParameters)),
    "llama_model_free": Function(None, (c_void_p,)),
    "llama_model_get_vocab": Function(c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": Function(c_int32, (c_void_p,)),
    "llama_vocab_is_eog": Function(c_bool, (c_void_p, c_int32)),
    "llama_init_from_model": Function(c_void_p, (c_void_p, ContextParameters)),
    "llama_get_memory": Function(c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": Function(c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_decode": Function(c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": Function(POINTER(c_float), (c_void_p, c_int32)),
    "llama_tokenize": Function(c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
}
"""The functions that are called."""
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
"""`ggml_log_callback`."""
ERROR = 4
"""`GGML_LOG_LEVEL_ERROR`."""


@functools.cache
def library() -> Any:
    """The library, its functions declared.

    Raises:
        MissingPartError: the package is not installed, or in another version.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
        for name, function in FUNCTIONS.items():
            pointer = getattr(loaded, name)
            pointer.restype, pointer.argtypes = function
    except (OSError, AttributeError) as error:
        raise MissingPartError(f"{path} is no library of llama.cpp {VERSION} ({error}): pip install {PACKAGE}=={VERSION}") from None
    return loaded


def library_path() -> Path:
    """Where the shared object is.

    Raises:
        MissingPartError: the package is not installed, or in another version.
    """
    way_out = "pip install 'lobit[gguf]'"
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingPartError(f"target gguf needs {PACKAGE}, which has llama.cpp: {way_out}") from None
    if found != VERSION:
        raise MissingPartError(f"{PACKAGE} {found} is installed, and the structures of {VERSION} alone are known: {way_out}")
    spec = util.find_spec(PACKAGE)
    paths = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob(f"{PACKAGE}*.so"))
    if not paths:
        raise MissingPartError(f"{PACKAGE} {found} has no shared object: {way_out}")
    return paths[0]


class LlamaError(LobitError):
    """llama.cpp refuses something; the message is its own."""


class Model:
    """A GGUF file, loaded.

    Args:
        path: the file.
        vocabulary: whether to load the vocabulary alone, without weights.
        overrides: fields that are texts, instead of the file's.

    Raises:
        LlamaError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, vocabulary: bool = False, overrides: Mapping[str, str] | None = None) -> None:
        self.library, self.said = library(), list[str]()
        self._log = LOG(self._keep)  # it must live as long as the library calls it
        self.library.llama_log_set(self._log, None)
        self.library.llama_backend_init()
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers, parameters.load_mode = 0, READ_WHOLE
        parameters.vocab_only, parameters.check_tensors = vocabulary, True
        told = [Override(TEXT, key.encode(), 0, value.encode()) for key, value in (overrides or {}).items()]
        self._overrides = (Override * (len(told) + 1))(*told)
        parameters.kv_overrides = ctypes.cast(self._overrides, c_void_p)
        self.handle = self.library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            raise LlamaError(self.told())
        self.vocabulary = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size = self.library.llama_vocab_n_tokens(self.vocabulary)

    def close(self) -> None:
        """Frees the memory of the model, which nothing may use any more."""
        self.library.llama_model_free(self.handle)

    def _keep(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            self.said.append(text.decode("utf-8", "replace").strip())

    def told(self) -> str:
        """What llama.cpp says is wrong in the call that was made last: the first line, which has the cause."""
        return self.said[0] if self.said else "llama.cpp does not say why"

    def ends(self, token: int) -> bool:
        """Whether apps stop at a token."""
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))

    def tokenize(self, text: str, around: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: special tokens in it are read as such.
            around: whether what the file says to put around a text is added.

        Raises:
            LlamaError: llama.cpp cannot tokenize it.
        """
        data = text.encode()
        room = (c_int32 * (len(data) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, data, len(data), room, len(room), around, True)
        if count < 0:
            raise LlamaError(f"{-count} tokens of a text of {len(data)} bytes")
        return list(room[:count])


class Context:
    """A model with its caches: one sequence of tokens.

    Args:
        model: the model.
        positions: how many it can hold.
        chunk: the most tokens in one call.
        threads: number of threads.

    Raises:
        LlamaError: llama.cpp cannot make it.
    """

    def __init__(self, model: Model, positions: int, chunk: int, threads: int) -> None:
        self.model, self.library = model, model.library
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = positions, chunk, chunk
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type, parameters.swa_full, parameters.no_perf = NO_FLASH, True, True
        model.said.clear()
        self.handle = self.library.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise LlamaError(model.told())
        self.memory = self.library.llama_get_memory(self.handle)

    def read(self, tokens: Sequence[int], position: int, every: bool) -> list[Any]:
        """Reads tokens behind those before a position, and forgets what was read from there on.

        Returns:
            Pointers to the logits after each token, or after the last alone; they hold until the next call.

        Raises:
            LlamaError: llama.cpp cannot.
        """
        count = len(tokens)
        if not self.library.llama_memory_seq_rm(self.memory, 0, position, -1):
            raise LlamaError(f"its caches cannot be taken back to position {position}")
        sequence = (c_int32 * 1)(0)
        wanted = range(0 if every else count - 1, count)
        batch = Batch(
            count,
            (c_int32 * count)(*tokens),
            None,
            (c_int32 * count)(*range(position, position + count)),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*[ctypes.cast(sequence, POINTER(c_int32))] * count),
            (c_int8 * count)(*[i in wanted for i in range(count)]),
        )
        self.model.said.clear()
        code = self.library.llama_decode(self.handle, batch)
        if code:
            raise LlamaError(f"llama_decode ends with {code}: {self.model.told()}")
        return [self.library.llama_get_logits_ith(self.handle, i) for i in wanted]
