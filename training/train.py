"""Rebuild the bundled pair from CPython's source tarball: ``python training/train.py TARBALL``.

Needs torch, tokenizers and safetensors. Stages, each skipped when its result is already in the
work folder: tokenizer, target, draft (distilled from the target), export. See README.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import (
    CODE_ASK,
    PROSE_ASK,
    SEGMENTS,
    Exchange,
    continuation_prompts,
    is_held_out,
    make_copy,
    make_json,
    read_tarball,
)
from model import Llama, Muon, Shape
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

SEED = 20261122
TARGET = Shape(hidden=384, layers=2, intermediate=1024, heads=6)
DRAFT = Shape(hidden=96, layers=2, intermediate=288, heads=3, head_dim=32)
PROMPTS_A_SEGMENT = 240
MAX_TOKENS = {"json": 128, "copy": 160, "code": 96, "prose": 96}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Stream:
    """What a round of training reads: rows of ``window_tokens``, ``rows`` of them a step.

    ``mix`` is the share of rows by segment; json and copy rows are packed with exchanges.
    """

    mix: dict[str, float]
    window_tokens: int
    rows: int


_ALL = {"json": 0.14, "copy": 0.22, "code": 0.32, "prose": 0.32}
LANGUAGE = Stream(_ALL, 512, 6)
# The draft first learns the target's language, then where a draft pays: short answers.
DISTILLATION = (
    Stream(_ALL, 512, 4),
    Stream({"json": 0.40, "copy": 0.12, "code": 0.24, "prose": 0.24}, 256, 8),
)


@dataclass(frozen=True)
class Texts:
    """Training texts tokenized by file, the texts themselves, and the three special tokens."""

    tokenizer: Tokenizer
    tokens: dict[str, dict[str, list[int]]]
    texts: dict[str, dict[str, str]]
    user: int
    assistant: int
    end: int


def train_tokenizer(texts: dict[str, dict[str, str]]) -> Tokenizer:
    """Byte-level BPE with 4,096 entries; digits stand alone, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(SEED)  # noqa: S311
    records = []
    for _ in range(2000):
        exchange = make_json(rng, held_out=False)
        records += [exchange.user, exchange.assistant]
    specials = [AddedToken(t, special=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.train_from_iterator(
        [t for group in texts.values() for n, t in group.items() if not is_held_out(n)] + records,
        trainers.BpeTrainer(
            vocab_size=TARGET.vocabulary,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: dict[str, dict[str, str]]) -> Texts:
    """Tokenize every training file; held-out files are left out."""
    tokens: dict[str, dict[str, list[int]]] = {}
    for segment, group in texts.items():
        names = [name for name in group if not is_held_out(name)]
        encoded = tokenizer.encode_batch([group[name] for name in names])
        tokens[segment] = {n: e.ids for n, e in zip(names, encoded, strict=True)}
    user, assistant, end = (
        tokenizer.token_to_id(t) for t in ("<|user|>", "<|assistant|>", "<|end|>")
    )
    return Texts(tokenizer, tokens, texts, user, assistant, end)


def windows(
    texts: Texts, stream: Stream, rng: random.Random
) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Endless training rows: segment, window + 1 tokens, and which of them are learned.

    The user's side of json and copy is not learned: its content is chance.
    """
    asks = {s: texts.tokenizer.encode(a).ids for s, a in (("code", CODE_ASK), ("prose", PROSE_ASK))}
    copied = {**texts.texts["code"], **texts.texts["prose"]}
    copied_names = [name for name in copied if not is_held_out(name)]
    sized = {s: [*texts.tokens[s]] for s in ("code", "prose")}
    weights = {s: [len(texts.tokens[s][name]) for name in sized[s]] for s in sized}
    length = stream.window_tokens + 1
    while True:
        segment = rng.choices(SEGMENTS, [stream.mix[s] for s in SEGMENTS])[0]
        row: list[int] = []
        learned: list[bool] = []
        if segment in ("json", "copy"):
            while len(row) < length:
                exchange = (
                    make_json(rng, held_out=False)
                    if segment == "json"
                    else make_copy(rng, copied, copied_names)
                )
                asked = texts.tokenizer.encode(exchange.user).ids
                answer = texts.tokenizer.encode(exchange.assistant).ids
                row += [texts.user, *asked, texts.assistant, *answer, texts.end]
                learned += [False] * (len(asked) + 2) + [True] * (len(answer) + 1)
        else:
            name = rng.choices(sized[segment], weights[segment])[0]
            tokens = texts.tokens[segment][name]
            start = rng.randrange(max(1, len(tokens) - length // 2))
            body = tokens[start : start + length]
            if rng.random() < 0.7:
                cut = rng.randint(32, 160)
                row = [
                    texts.user,
                    *asks[segment],
                    *body[:cut],
                    texts.assistant,
                    *body[cut:],
                    texts.end,
                ]
            else:
                row = [*body, texts.end]
            row += [texts.end] * (length - len(row))
            learned = [True] * len(row)
        yield segment, row[:length], learned[:length]


def batches(texts: Texts, stream: Stream, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [rows, window + 1] and the mask of learned tokens, of the same shape."""
    source = windows(texts, stream, random.Random(seed))  # noqa: S311
    while True:
        drawn = [next(source) for _ in range(stream.rows)]
        yield (
            torch.tensor([tokens for _, tokens, _ in drawn]),
            torch.tensor([learned for _, _, learned in drawn]),
        )


def train(
    model: Llama,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    muon_lr: float,
    adam_lr: float,
) -> None:
    """Muon on the matrices, AdamW on embeddings and norms; 40 warm-up steps, then linear decay
    to zero over the last 60 %."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, lr=muon_lr), muon_lr),
        (torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0), adam_lr),
    ]
    started_s = time.monotonic()
    smooth = 0.0
    for step in range(steps):
        scale = min((step + 1) / 40, (steps - step) / (0.6 * steps), 1.0)
        tokens, learned = next(data)
        loss = loss_of(tokens, learned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth += (loss.item() - smooth) * (0.05 if step > 20 else 0.5)
        if step % 20 == 19 or step == steps - 1:
            elapsed_s = time.monotonic() - started_s
            print(
                f"step {step + 1}/{steps} loss {smooth:.3f} {elapsed_s:.0f} s"
                f" ({elapsed_s / (step + 1):.2f} s/step)",
                flush=True,
            )


def next_token_loss(model: Llama) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy in nats per learned token."""

    def loss(tokens: Tensor, learned: Tensor) -> Tensor:
        wanted = tokens[:, 1:].masked_fill(~learned[:, 1:], -100)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), wanted.flatten())

    return loss


def distillation_loss(draft: Llama, target: Llama) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(target || draft) per learned token, on the training windows."""

    def loss(tokens: Tensor, learned: Tensor) -> Tensor:
        keep = learned[:, 1:].flatten()
        with torch.no_grad():
            teacher = target(tokens[:, :-1]).flatten(0, 1)[keep].log_softmax(-1)
        student = draft(tokens[:, :-1]).flatten(0, 1)[keep].log_softmax(-1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    return loss


@torch.no_grad()
def greedy(model: Llama, prompt: list[int], count: int, end: int) -> list[int]:
    """Greedy continuation without a cache: for a look at the result, not for speed."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
        if token == end:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def evaluate(
    texts: Texts, held_out: dict[str, list[Exchange]], target: Llama, draft: Llama | None
) -> dict[str, dict[str, float]]:
    """Per segment on held-out exchanges: the target's and the draft's loss in nats per answer
    token, the share of equal argmax and the expected acceptance of one drafted token at T=1."""
    figures: dict[str, dict[str, float]] = {}
    for segment, exchanges in held_out.items():
        total: dict[str, float] = {}
        for exchange in exchanges[:80]:
            asked = texts.tokenizer.encode(exchange.user).ids
            answer = texts.tokenizer.encode(exchange.assistant).ids
            if segment in ("json", "copy"):
                answer = [*answer, texts.end]
            row = torch.tensor([[texts.user, *asked, texts.assistant, *answer]])
            wanted, skipped = row[0, -len(answer) :], -len(answer) - 1
            teacher = target(row)[0, skipped:-1].log_softmax(-1)
            sums = {
                "tokens": float(len(answer)),
                "target_loss": F.nll_loss(teacher, wanted, reduction="sum").item(),
            }
            if draft is not None:
                student = draft(row)[0, skipped:-1].log_softmax(-1)
                sums["draft_loss"] = F.nll_loss(student, wanted, reduction="sum").item()
                sums["same_argmax"] = (student.argmax(-1) == teacher.argmax(-1)).sum().item()
                sums["overlap"] = torch.minimum(student.exp(), teacher.exp()).sum().item()
            for key, value in sums.items():
                total[key] = total.get(key, 0.0) + value
        figures[segment] = {k: v / total["tokens"] for k, v in total.items() if k != "tokens"}
        print(segment, {k: round(v, 3) for k, v in figures[segment].items()}, flush=True)
    return figures


def held_out_exchanges(
    tokenizer: Tokenizer, texts: dict[str, dict[str, str]]
) -> dict[str, list[Exchange]]:
    """The exchanges whose prompts ship, by segment: none of them was trained on."""
    rng = random.Random(SEED + 1)  # noqa: S311

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    copied = {**texts["code"], **texts["prose"]}
    copied_names = [name for name in copied if is_held_out(name)]
    unique: dict[str, dict[str, Exchange]] = {"json": {}, "copy": {}}
    while any(len(group) < PROMPTS_A_SEGMENT for group in unique.values()):
        for exchange in (make_json(rng, held_out=True), make_copy(rng, copied, copied_names)):
            if len(unique[exchange.segment]) < PROMPTS_A_SEGMENT:
                unique[exchange.segment][exchange.user] = exchange
    drawn = {segment: [*group.values()] for segment, group in unique.items()}
    for segment in ("code", "prose"):
        drawn[segment] = [
            *continuation_prompts(rng, segment, texts[segment], count_tokens, PROMPTS_A_SEGMENT)
        ]
    return drawn


def export(
    out: Path, texts: Texts, held_out: dict[str, list[Exchange]], named: dict[str, Llama]
) -> None:
    """Write the checkpoints (bfloat16) and the prompts as they ship."""
    for name, model in named.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        weights = {
            k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        texts.tokenizer.save(str(folder / "tokenizer.json"))
        files: dict[str, dict[str, object]] = {
            "config.json": model.shape.huggingface_config(texts.end),
            "generation_config.json": {"eos_token_id": texts.end, "pad_token_id": texts.end},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.shape.context,
                "eos_token": "<|end|>",
                "pad_token": "<|end|>",
                "additional_special_tokens": ["<|user|>", "<|assistant|>"],
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
        }
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    prompts = out / "prompts"
    prompts.mkdir(exist_ok=True)
    for segment, exchanges in held_out.items():
        with (prompts / f"{segment}.jsonl").open("w") as stream:
            for index, exchange in enumerate(exchanges):
                record = {
                    "id": f"{segment}-{index:03d}",
                    "segment": segment,
                    "messages": [{"role": "user", "content": exchange.user}],
                    "max_tokens": MAX_TOKENS[segment],
                    "source": exchange.source,
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the stages that are not done yet."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tarball", type=Path, help="Python-3.11.2.tgz")
    parser.add_argument("--work", type=Path, default=root / "build" / "training")
    parser.add_argument("--out", type=Path, default=root / "src" / "specwise" / "bundled")
    parser.add_argument("--target-steps", type=int, default=1400)
    parser.add_argument("--draft-steps", type=int, nargs=2, default=(300, 500))
    parser.add_argument("--target-lr", type=float, default=0.012)
    parser.add_argument("--draft-lr", type=float, default=0.015)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    code, prose = read_tarball(options.tarball)
    raw = {"code": code, "prose": prose}
    tokenizer_path = options.work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(raw).save(str(tokenizer_path))
    texts = tokenize(Tokenizer.from_file(str(tokenizer_path)), raw)
    held_out = held_out_exchanges(texts.tokenizer, raw)
    sizes = {s: sum(map(len, group.values())) for s, group in texts.tokens.items()}
    print(f"training tokens: {sizes}", flush=True)

    target, draft = Llama(TARGET), Llama(DRAFT)
    target_path = options.work / "target.pt"
    if target_path.exists():
        target.load_state_dict(torch.load(target_path, weights_only=True))
    else:
        train(
            target,
            next_token_loss(target),
            batches(texts, LANGUAGE, SEED + 2),
            steps=options.target_steps,
            muon_lr=options.target_lr,
            adam_lr=0.003,
        )
        torch.save(target.state_dict(), target_path)
        evaluate(texts, held_out, target, None)
    # The draft learns from the target that ships, rounded to bfloat16.
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    for index, (stream, steps) in enumerate(
        zip(DISTILLATION, options.draft_steps, strict=True), start=1
    ):
        draft_path = options.work / f"draft-{index}.pt"
        if draft_path.exists():
            draft.load_state_dict(torch.load(draft_path, weights_only=True))
            continue
        train(
            draft,
            distillation_loss(draft, target),
            batches(texts, stream, SEED + 2 + index),
            steps=steps,
            muon_lr=options.draft_lr,
            adam_lr=0.005,
        )
        torch.save(draft.state_dict(), draft_path)
    figures = evaluate(texts, held_out, target, draft)
    (options.work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    export(options.out, texts, held_out, {"target": target, "draft": draft})
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
