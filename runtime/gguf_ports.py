"""What a GGUF file's tensors are called and in which order they run, for export too."""

from __future__ import annotations

GGUF_FILE = "model.gguf"
QUIET_END = {"GGML_NO_BACKTRACE": "1"}
"""Environment of processes that llama.cpp may end: it would start a debugger to show where."""
PAIRED = frozenset({"llama", "granite_swa", "smollm3"})
"""Architectures whose rotary embedding turns neighbouring entries of a head; the others turn one half against the other."""
WEIGHTLESS = "lobit.weightless_qk_norm"
"""Field of a file whose norms of q and k are ones that stand for norms without weights."""
EMBEDDING, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""Products of a layer in the order in which they run. Where `attn_qkv` is there, the three before it are not; where `ffn_gate` is not,
`ffn_up` has its rows first."""
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
VECTORS = (
    "attn_norm.weight",
    "attn_q.bias",
    "attn_k.bias",
    "attn_v.bias",
    *QK_NORMS,
    "attn_sub_norm.weight",
    "attn_output.bias",
    "post_attention_norm.weight",
    "ffn_norm.weight",
    "ffn_gate.bias",
    "ffn_up.bias",
    "ffn_sub_norm.weight",
    "ffn_down.bias",
    "post_ffw_norm.weight",
)
"""Norms and biases of a layer in the order in which they run."""
TURNED = ("attn_q.", "attn_k.")
"""Beginnings of the names of tensors whose rows are in another order where the architecture is in `PAIRED`."""
