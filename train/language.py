"""Warm start of a small causal LM on text alone, in place of the pretrained LLM that a user has.

It learns the words, the form of a chat and which answers a question can have; finding the right one takes the
picture. The result is a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from vlm_vision.errors import DataError
from vlm_vision.train.language_config import LanguageConfig
from vlm_vision.train.optim import parameter_groups, warmup_cosine, warmup_steps
from vlm_vision.train.run import Run, check_finite, plain_attention, prepare_process, training_attention

Chat = list[dict[str, str]]
"""Messages of `role` (user, assistant) and `content`, as transformers' chat templates take them."""

ROLES = {"human": "user", "gpt": "assistant"}
USER, ASSISTANT = "<|user|>", "<|assistant|>"

# Every message adds to the end, so the rendering of the first messages is how that of all of them begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def text_chats(records: Iterable[Mapping[str, Any]]) -> list[Chat]:
    """LLaVA-format records as chats without their pictures: `<image>` is left out."""
    return [
        [
            {"role": ROLES[turn["from"]], "content": turn["value"].replace("<image>", "").strip()}
            for turn in record["conversations"]
        ]
        for record in records
    ]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: frequent words become one token, and any other text falls apart into bytes.

    A word is the same token wherever it stands, at the start of an answer as in the middle of a caption:
    spaces and line breaks in a row count as one space, and a text begins with one. What a tokenizer for
    general use must keep apart, a small model would have to learn twice.
    """
    markers = ["<pad>", "<unk>", "<s>", "</s>", USER, ASSISTANT]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@training_attention()
def warm_start_llm(
    chats: Sequence[Chat], texts: Sequence[str], config: LanguageConfig, folder: str | Path
) -> dict[str, float]:
    """Train tokenizer and LM on chats and plain texts, and save both to `folder`.

    Beside the model lie `config.yaml`, `metrics.jsonl` and `tensorboard/` of its training.

    Returns:
        loss: mean next-token loss over the last tenth of the steps, nats.
        perplexity: its exponential.
        tokens: seen in training. parameters, vocab_size: of the model.

    Raises:
        DataError: chats and texts together do not fill one row of training.
    """
    prepare_process(config.seed)
    tokenizer = train_tokenizer(_all_texts(chats, texts), config.vocab_size)
    rows = pack(tokenizer, chats, texts, config)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            # Normalised queries and keys: attention starts uneven, and learns to look things up in fewer
            # steps than a Llama's of this size.
            qk_layernorm=True,
            hidden_act="gelu",
            # The usual 0.02 suits wide models; at this width it would leave every layer's output near zero.
            initializer_range=config.hidden_size**-0.5,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
        )
    )
    losses = _fit(model, rows, config, Path(folder))
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = sum(losses[-max(1, config.steps // 10) :]) / max(1, config.steps // 10)
    return {
        "loss": loss,
        "perplexity": float(torch.tensor(loss).exp()),
        "tokens": config.steps * config.batch_size * config.row_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": len(tokenizer),
    }


def pack(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], texts: Sequence[str], config: LanguageConfig
) -> torch.Tensor:
    """Token ids [rows, row_length]: chats and texts in random order, end to end, the tail cut off.

    No more of them are encoded than the training will see.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(chats) + len(texts), generator=generator).tolist()
    enough = config.steps * config.batch_size * config.row_length
    stream: list[int] = []
    for start in range(0, len(order), 1000):
        rendered = [
            tokenizer.apply_chat_template(chats[i], tokenize=False)
            if i < len(chats)
            else f"{tokenizer.bos_token}{texts[i - len(chats)]}{tokenizer.eos_token}"
            for i in order[start : start + 1000]
        ]
        for tokens in tokenizer(rendered, add_special_tokens=False)["input_ids"]:
            stream += tokens
        if len(stream) >= enough:
            break
    rows = min(len(stream), enough) // config.row_length
    if rows == 0:
        raise DataError(
            f"the texts give {len(stream)} tokens, which do not fill one row of {config.row_length}: "
            "give more text, or a smaller row_length"
        )
    return torch.tensor(stream[: rows * config.row_length]).reshape(rows, config.row_length)


def _all_texts(chats: Sequence[Chat], texts: Sequence[str]) -> Iterable[str]:
    yield from texts
    for chat in chats:
        yield from (message["content"] for message in chat)


def _fit(model: PhiForCausalLM, rows: torch.Tensor, config: LanguageConfig, folder: Path) -> list[float]:
    """Next-token training over the rows, reshuffled when they run out; returns the loss of every step."""
    run = Run(folder, config)
    groups = parameter_groups(model, (), lr=config.lr, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = warmup_cosine(optimizer, config.steps, warmup_steps(config.steps))
    generator = torch.Generator().manual_seed(config.seed)
    upcoming = torch.empty(0, dtype=torch.long)
    losses = []
    plain_attention(model)
    model.train()
    with run.progress(config.steps, "language model") as bar:
        for step in range(1, config.steps + 1):
            while len(upcoming) < config.batch_size:
                upcoming = torch.cat([upcoming, torch.randperm(len(rows), generator=generator)])
            batch, upcoming = rows[upcoming[: config.batch_size]], upcoming[config.batch_size :]
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            check_finite(loss.item(), grad_norm, step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            run.log(step, loss=losses[-1], lr=float(schedule.get_last_lr()[0]), grad_norm=grad_norm)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    run.close()
    return losses
