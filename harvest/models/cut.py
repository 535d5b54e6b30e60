"""Prompts longer than what the text encoders read: counted, and told in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from harvest.models.pipelines import LoadedModel
from harvest.models.quiet import logged

_MOST = 512
"""Tokens of T5 that FLUX reads at most."""
_BATCH = 4096


def cut_prompts(
    model: LoadedModel, prompts: Sequence[str], max_sequence_length: int | None = None
) -> str | None:
    """How many prompts the text encoders read only the beginning of.

    Args:
        model: a model with its tokenizers.
        prompts: texts.
        max_sequence_length: length of the text in T5 tokens; None for the model's own.

    Returns:
        one line with the counts and what helps; None where every prompt is read to its end.
    """
    pipe, length = model.pipe, max_sequence_length or model.max_sequence_length
    clip, count = pipe.tokenizer_max_length, len(prompts)
    parts = []
    if over := _longer(pipe.tokenizer, prompts, clip):
        parts.append(
            f"{over} of {count} prompts are longer than {clip} tokens, and CLIP reads only the first {clip}"
        )
    if over := _longer(pipe.tokenizer_2, prompts, length):
        remedy = f" (--max-sequence-length raises it, to {_MOST} at most)"
        parts.append(
            f"{over} of {count} prompts are longer than {length} tokens, and T5 reads only the first {length}"
            + (remedy if length < _MOST else "")
        )
    return "; ".join(parts) or None


def tell_cut_prompts(
    model: LoadedModel, prompts: Sequence[str], max_sequence_length: int | None = None
) -> None:
    """Print the line of `cut_prompts` to stderr, if there is one."""
    line = cut_prompts(model, prompts, max_sequence_length)
    if line:
        print(f"note: {line}", file=sys.stderr)


def _longer(tokenizer: Any, prompts: Sequence[str], limit: int) -> int:
    """How many prompts have more tokens than `limit`, those of begin and end included."""
    over = 0
    with logged():
        for first in range(0, len(prompts), _BATCH):
            batch = tokenizer(list(prompts[first : first + _BATCH]), return_attention_mask=False)
            over += sum(len(ids) > limit for ids in batch["input_ids"])
    return over
