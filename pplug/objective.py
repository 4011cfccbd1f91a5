"""The objective: next-token cross-entropy on the target alone, through a frozen LLM.

Prompts of a decoder-only LLM are padded on the left, so that targets end at the same place and the LLM computes logits
for the last positions only; what stands before the rows is read without a gradient (`prefix.py`). An encoder's input is
padded on the right: where its positions are learned (BART), they are counted from the first place. Nothing is padded to
a fixed length.
Shapes: B samples, L positions of the longest sample, T longest target, R rows per sample (1 or 1+P), H LLM width.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, eq. 5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pplug.llm import FrozenLLM
from pplug.logits import IGNORED, LOGITS, losses_in_pieces, vocabulary
from pplug.prefix import KeptBeginnings, read_before
from pplug.splice import Prompt


def splice_rows(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    soft_BRH: Tensor,
    row_counts: Sequence[int],
    ends: Sequence[list[int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with persona rows in their place, padded on the left; an encoder's on the right.

    Args:
        prompts: token ids around the rows.
        soft_BRH: instruction and persona rows, float32.
        row_counts: how many rows of each sample stand in its prompt (0, 1, or 1+P).
        ends: token ids after the prompt (the target of a decoder-only LLM; empty for generation).

    Returns:
        embeddings (B, L, H) in the LLM's dtype, attention mask (B, L) int64, token ids (B, L) int64 (0 at rows).
    """
    device = soft_BRH.device
    lengths = [len(p) + n + len(e) for p, n, e in zip(prompts, row_counts, ends, strict=True)]
    width = max(lengths)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    sample_at: list[int] = []
    position_at: list[int] = []
    row_at: list[int] = []
    for i, (prompt, n, end) in enumerate(zip(prompts, row_counts, ends, strict=True)):
        start = 0 if llm.encoder_decoder else width - lengths[i]
        place, stop = start + len(prompt.before), start + lengths[i]
        ids[i, start:place] = torch.tensor(prompt.before, dtype=torch.long)
        ids[i, place + n : stop] = torch.tensor(prompt.after + end, dtype=torch.long)
        mask[i, start:stop] = 1
        sample_at += [i] * n
        position_at += range(place, place + n)
        row_at += range(n)
    ids, mask = ids.to(device), mask.to(device)
    embeddings = llm.embedding(ids)
    if sample_at:
        where = torch.tensor([sample_at, position_at, row_at], device=device)
        rows = soft_BRH[where[0], where[2]].to(embeddings.dtype)
        embeddings = embeddings.index_put((where[0], where[1]), rows)
    return embeddings, mask, ids


def target_loss(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    soft_BRH: Tensor,
    row_counts: Sequence[int],
    targets: Sequence[list[int]],
    kept: KeptBeginnings | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the targets' tokens, and which targets would have been written greedily.

    Args:
        prompts, soft_BRH, row_counts: as in `splice_rows`.
        targets: token ids of each reply, EOS included.
        kept: what is known of the prompts' beginnings (`read_before`).

    Returns:
        (scalar float32 with gradient into soft_BRH, (B,) bool: every target token is the likeliest one, but for the
        reply head, with which each reply is made to begin). Divide the loss by the target tokens of the whole batch,
        over all workers, so that the gradient does not depend on how samples are split.
    """
    longest, begun = max(len(target) for target in targets), len(llm.prompt_builder.reply_head)
    labels = torch.full((len(targets), longest), IGNORED, dtype=torch.long)
    if llm.encoder_decoder:
        embeddings, mask, _ = splice_rows(llm, prompts, soft_BRH, row_counts, [[] for _ in targets])
        for i, target in enumerate(targets):
            labels[i, : len(target)] = torch.tensor(target)
        labels = labels.to(soft_BRH.device)
        starts = llm.model.prepare_decoder_input_ids_from_labels(labels=labels)
        given = {"inputs_embeds": embeddings, "attention_mask": mask, "decoder_input_ids": starts, "use_cache": False}
    else:
        cache, read_BS = read_before(llm, prompts, row_counts, kept)
        rest = prompts if cache is None else [Prompt([], prompt.after) for prompt in prompts]
        embeddings, mask, _ = splice_rows(llm, rest, soft_BRH, row_counts, targets)
        for i, target in enumerate(targets):
            labels[i, longest - len(target) :] = torch.tensor(target)
        labels = labels.to(soft_BRH.device)
        mask = torch.cat([read_BS, mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, read_BS.shape[1] :]
        given = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        given["past_key_values"] = cache
    words = vocabulary(llm.model)
    if labels.numel() * words > LOGITS and llm.parts is not None:
        hidden = llm.parts.hidden(**given)
        hidden = hidden if llm.encoder_decoder else hidden[:, -longest - 1 : -1]
        wanted = labels != IGNORED
        loss, exact = losses_in_pieces(llm.parts, hidden[wanted], labels[wanted], max(1, LOGITS // words))
        right = torch.ones_like(wanted).masked_scatter(wanted, exact)
        return loss, right[:, begun:].all(1)
    if not llm.encoder_decoder:
        given["logits_to_keep"] = longest + 1
    logits = llm.model(**given).logits
    logits = logits if llm.encoder_decoder else logits[:, :-1]
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return loss, right[:, begun:].all(1)
