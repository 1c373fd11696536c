"""What an engine's log says about a model that it would not load: the field of `config.json` to change. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["PATTERNS", "Refusal", "explain_refusal"]

_NUM_LINES = 12
# The last form is that of our own server.
_ERROR_LINE = re.compile(r"\b(\w*(Error|Exception|error|ERROR|fatal|FATAL|abort|Aborted|panicked))\b|^crosschip: ")
# Before each line of a log: the process (vLLM's workers), level, time and place.
_PREFIX = re.compile(r"^\s*(\(\w[\w-]* pid=\d+\)\s*)?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
# Sources that a traceback quotes say less than the error at its end.
_NOISE = re.compile(
    r"\b(INFO|WARNING|DEBUG)\b|^\s*(File \"|raise |await |return |self\.|[\^~]+\s*$|Traceback|During handling|"
    r"The above exception)|[Ss]ee (root cause above|stack trace \(above\))"
)


@dataclass(frozen=True)
class Pattern:
    """A sentence of some engine's log, the fields that it is about, and what to do."""

    expression: str
    fields: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Refusal:
    """Why an engine refused. `fields` with their values in the configuration; empty when the log names none."""

    fields: dict[str, Any]
    message: str
    advice: str
    lines: list[str]

    @property
    def sentence(self) -> str:
        """The refusal in one sentence."""
        named = ", ".join(f"{name} = {value!r}" for name, value in self.fields.items())
        return f"{named}: {self.message}" if named else self.message


# The first that matches counts: the more exact ones come first.
PATTERNS = (
    Pattern(
        r"[Hh]ead[_ ]size[^\n]{0,60}?(not supported|unsupported|is not in|[Ss]upported head)|"
        r"(head_size|head_dim|[Hh]ead dim)[^\n]{0,80}(not supported|unsupported|must be)|Unsupported head",
        ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"),
        "this engine's attention takes certain head sizes only: with latent attention kv_lora_rank + qk_rope_head_dim "
        "(DeepSeek-V3: 512 + 64), without it qk_nope_head_dim + qk_rope_head_dim; VLLM_MLA_DISABLE=1 switches vLLM to "
        "the latter",
    ),
    Pattern(
        r"No valid attention backend|No attention backend|Selected backend [^\n]* is not valid",
        ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        "no attention of this engine takes these head sizes in this dtype here; see the reasons in the log",
    ),
    Pattern(
        r"topk_method|e_score_correction_bias[^\n]*(not found|no module|KeyError|missing|unexpected)|"
        r"KeyError: '[^']*e_score_correction_bias'",
        ("topk_method",),
        "write topk_method = noaux_tc and scoring_func = sigmoid: without them the loader has no place for the "
        "router's bias",
    ),
    Pattern(
        r"Unknown RoPE scaling|[Uu]nknown rope|rope_type[^\n]*(not|unknown|Unrecognized|must)|"
        r"rope_scaling[^\n]*(not|unknown|must|missing|Unrecognized)|rope_parameters[^\n]*(not|unknown|must|missing)",
        ("rope_scaling",),
        "leave rope_scaling out, or give one that the engine knows (type = yarn, with factor and "
        "original_max_position_embeddings)",
    ),
    Pattern(
        r"[Ee]xpert[^\n]*group|n_group|num_expert_group|topk_group|experts_per_group",
        ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"),
        "make n_routed_experts a multiple of n_group, and leave the chosen groups enough experts",
    ),
    Pattern(
        r"num_attention_heads[^\n]*divisible|attention heads[^\n]*divisible|must be divisible by tensor parallel",
        ("num_attention_heads",),
        "make num_attention_heads a multiple of the tensor-parallel size, or lower that size",
    ),
    Pattern(
        r"vocab[_ ]size|padding_size|vocabulary size|[Vv]ocab[^\n]*(mismatch|divisible|multiple|pad)|n_vocab",
        ("vocab_size",),
        "round vocab_size up to a multiple of 64 (128 under tensor parallelism) and export again",
    ),
    Pattern(
        r"tie_word_embeddings|tied? (word )?embedding|lm_head\.weight[^\n]*(missing|not found|not initialized)|"
        r"not initialized from checkpoint: \{[^}]*lm_head",
        ("tie_word_embeddings",),
        "train with tie_word_embeddings = false, or export the output matrix of its own",
    ),
    Pattern(
        r"max[_-]model[_-]len|max_position_embeddings|max seq(uence)? len|"
        r"KV cache[^\n]*(larger|needed|not enough|insufficient)",
        ("max_position_embeddings",),
        "serve with a smaller maximum length, or give the cache more memory (VLLM_CPU_KVCACHE_SPACE on vLLM's CPU)",
    ),
    Pattern(
        r"q_lora_rank",
        ("q_lora_rank",),
        "give q_lora_rank a number, or leave it out, as the engine's message says",
    ),
    Pattern(
        r"num_nextn_predict_layers|layers\.\d+\.(enorm|hnorm|eh_proj|shared_head)",
        ("num_nextn_predict_layers",),
        "the engine does not know the multi-token-prediction module: hand off with num_nextn_predict_layers = 0",
    ),
    Pattern(
        r"[Mm]odel architectures? [^\n]*not supported|unknown model architecture|does not recognize this architecture|"
        r"[Uu]nrecognized model|model_type[^\n]*(not|unknown)",
        ("architectures", "model_type"),
        "this version of the engine does not run the architecture: take a newer one, or another engine",
    ),
    Pattern(
        r"bfloat16[^\n]*not supported|dtype[^\n]*not supported|Unsupported dtype|float16 is not supported",
        ("torch_dtype",),
        "hand off in a dtype that the engine computes in ([handoff] dtype)",
    ),
    Pattern(
        r"size mismatch|shape mismatch|[Ss]hape[^\n]*(does not match|mismatch|expected)|AssertionError[^\n]*shape",
        (),
        "the engine builds a tensor of another shape: compare the sizes in its message with config.json",
    ),
    Pattern(
        r"[Tt]okenizer[^\n]*(not|fail|error|missing|unknown)",
        (),
        "the engine cannot read the tokenizer files: start it with token ids only, or convert them",
    ),
    Pattern(
        r"No module named|cannot import name|ImportError|cannot open shared object|Could not load this library",
        (),
        "the engine's own environment is broken, not the model: install what it lacks, remove what does not fit "
        "its torch",
    ),
    Pattern(
        r"[Oo]ut of memory|Cannot allocate memory|bad_alloc|MemoryError",
        (),
        "give the engine more memory, or a smaller cache",
    ),
)


def explain_refusal(log: str, config: dict[str, Any]) -> Refusal:
    """The field to change, from the log of an engine that ended instead of serving.

    Only the lines that speak of errors are matched; where none of the known sentences is among them, the refusal has no
    fields, and the last error lines are all it says.
    """
    lines = _error_lines(log)
    for pattern in PATTERNS:
        for line in reversed(lines):  # the last error is the one that ended it, the earlier are often its shadows
            if re.search(pattern.expression, line):
                values = {name: config.get(name) for name in pattern.fields}
                return Refusal(values, line[:400], pattern.advice, lines[-_NUM_LINES:])
    shown = lines[-_NUM_LINES:] or [line for line in log.splitlines() if line.strip()][-_NUM_LINES:]
    message = shown[-1][:400] if shown else "it ended without a word"
    return Refusal({}, message, "none of the known reasons; the last lines of the log are beside this", shown)


def _error_lines(log: str) -> list[str]:
    """Lines that name an error, without what stands before each line of a log, and without quoted sources."""
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    return [line for line in lines if _ERROR_LINE.search(line) and not _NOISE.search(line)]
