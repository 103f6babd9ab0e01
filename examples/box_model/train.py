"""Train the model in the box from nothing, on the text of `data.py`.

    python -m examples.box_model.train --out minivllm/box_model --scratch DIR --minutes 60

Owns the training loop, its checkpoints and its curve. The learning rate follows the clock: up, flat, then down
to nothing over the last part of `--minutes`; stopped and started again with the same `--scratch`, it goes on
where it was. Answers are trained on, what the model reads is not.

With `--teacher DIR` the wanted thing is not the text but what another model would say of it: its distribution
over the vocabulary at every token of an answer (Hinton et al. 2015, arXiv:1503.02531). So a draft model is made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from examples.box_model import skills
from examples.box_model.batches import IGNORED, Batch, pack
from examples.box_model.chat import segments
from examples.box_model.data import documents
from examples.box_model.export import export, read
from examples.box_model.model import Qwen3, Sizes, document_mask
from examples.box_model.tokenizer import train_tokenizer

PRESETS = {
    "minnow": Sizes(),
    "minnow-draft": Sizes(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
                          num_key_value_heads=1, head_dim=32),
}  # fmt: skip
WARMUP = 0.02
DECAY = 0.4


class Trainer:
    """The model, its optimizers, and how far they are."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.model = Qwen3(PRESETS[args.preset], args.seed).to(args.device)
        self.teacher = read(args.teacher).to(args.device, torch.bfloat16) if args.teacher else None
        self.hidden = torch.compile(self.model.hidden) if args.compile else self.model.hidden
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim == 1 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=args.lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = 0
        self.elapsed = 0.0
        self.tokens = 0
        self.curve: list[dict] = []
        self.agreement: float | None = None  # share of the last step's tokens that student and teacher guess alike

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "elapsed": self.elapsed, "tokens": self.tokens, "curve": self.curve,
        }  # fmt: skip

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed, self.tokens = state["step"], state["elapsed"], state["tokens"]
        self.curve = state["curve"]

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, vocabulary] and targets [n] of the positions that are trained on."""
        chosen = batch.targets.flatten() != IGNORED
        index = chosen.nonzero().squeeze(1)
        mask = document_mask(batch.documents, torch.bfloat16)
        with torch.autocast(self.args.device.split(":")[0], torch.bfloat16):
            hidden = self.hidden(batch.ids, batch.positions, mask)
            logits = self.model.logits(hidden.flatten(0, 1)[index])
        return logits, batch.targets.flatten()[index]

    @torch.no_grad()
    def taught(self, batch: Batch) -> Tensor:
        """The teacher's logits [n, vocabulary], float32, where `answers` has the student's."""
        mask = document_mask(batch.documents, torch.bfloat16)
        hidden = self.teacher.hidden(batch.ids, batch.positions, mask)
        return self.teacher.logits(hidden[batch.targets != IGNORED]).float()

    def train_on(self, batch: Batch) -> float:
        """One step; the mean loss of its tokens."""
        rate = learning_rate(self.elapsed / (60 * self.args.minutes))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * rate
        logits, targets = self.answers(batch)
        if self.teacher is None:
            loss = F.cross_entropy(logits.float(), targets)
        else:
            taught = self.taught(batch)
            loss = distance(taught, logits.float())
            self.agreement = (logits.argmax(-1) == taught.argmax(-1)).float().mean().item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel()
        return loss.item()

    @torch.no_grad()
    def exact_answers(self, count: int) -> dict[str, float]:
        """Share of held-out exchanges whose greedy answer would be the expected one, by skill.

        Teacher-forced, so one forward pass does: if each token is the likeliest after the right ones, greedy
        decoding says them all. Skills with several right answers score low here and are measured by evaluate.py.
        """
        rng = Random(f"held out {self.step}")
        makers = [maker for maker in skills.MIX for _ in range(count)]
        exchanges = [maker(rng, True) for maker in makers]
        texts = (segments([*one.messages, one.answer], one.tools) for one in exchanges)
        texts = ([(text, said and index == len(parts) - 2) for index, (text, said) in enumerate(parts)]
                 for parts in texts)  # fmt: skip
        right: dict[str, list[bool]] = defaultdict(list)
        for maker, text in zip(makers, texts):
            right[maker.__name__].append(text)
        return {name: self._exact(items) for name, items in right.items()}

    def _exact(self, texts: list) -> float:
        exact = total = 0
        for batch in pack(self.tokenizer, iter(texts), self.args.rows, self.args.length):
            batch = batch.to(self.args.device).without_empty_rows()
            mask = document_mask(batch.documents, torch.bfloat16)
            with torch.autocast(self.args.device.split(":")[0], torch.bfloat16):
                hidden = self.model.hidden(batch.ids, batch.positions, mask)
            chosen = batch.targets != IGNORED
            wrong = torch.zeros_like(chosen)
            logits = self.model.logits(hidden[chosen].float())
            wrong[chosen] = logits.argmax(-1) != batch.targets[chosen]
            for row in range(len(wrong)):
                numbers = batch.documents[row]
                exact += sum(not wrong[row, numbers == n].any() for n in range(1, int(numbers.max()) + 1))
                total += int(numbers.max())
        return exact / total


def distance(taught: Tensor, said: Tensor) -> Tensor:
    """KL divergence of what is said from what is taught, both logits [n, vocabulary]; mean over n."""
    said, taught = F.log_softmax(said, -1), F.log_softmax(taught, -1)
    return F.kl_div(said, taught, reduction="batchmean", log_target=True)


def learning_rate(progress: float) -> float:
    """The share of the top rate: warm up, stay, go down linearly."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.02)
    return min(1.0, max(1.0 - progress, 0.0) / DECAY)


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; what was there before is replaced only when the new one is whole."""
    torch.save(trainer.state(), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def tokenizer_in(scratch: Path, args: argparse.Namespace) -> Tokenizer:
    """The run's tokenizer, trained when there is none yet."""
    path = args.tokenizer or (args.teacher or scratch) / "tokenizer.json"
    if not path.exists():
        train_tokenizer(PRESETS[args.preset].vocab_size, args.tokenizer_documents, args.seed).save(str(path))
    return Tokenizer.from_file(str(path))


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, tokenizer_in(args.scratch, args))
    checkpoint = args.scratch / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(torch.load(checkpoint, map_location=args.device, weights_only=True))
        print(f"goes on at step {trainer.step}", flush=True)
    # A run that goes on reads fresh text, not what it has seen.
    stream = documents(args.seed + 1 + trainer.step, dict(args.emphasis))
    batches = pack(trainer.tokenizer, stream, args.rows, args.length)
    clock, losses, since_save, since_exam = time.monotonic(), [], 0.0, 0.0
    while trainer.elapsed < 60 * args.minutes:
        losses.append(trainer.train_on(next(batches).to(args.device)))
        now = time.monotonic()
        spent, clock = now - clock, now
        trainer.elapsed, since_save, since_exam = (
            trainer.elapsed + spent,
            since_save + spent,
            since_exam + spent,
        )
        if trainer.step % args.log_every == 0:
            note(trainer, sum(losses) / len(losses))
            losses = []
        if since_exam > 60 * args.exam_minutes:
            since_exam = 0.0
            exam(trainer, args.exam_count)
        if since_save > 60 * args.save_minutes:
            since_save = 0.0
            save(trainer, checkpoint)
    exam(trainer, 4 * args.exam_count)
    save(trainer, checkpoint)
    finish(trainer)


def note(trainer: Trainer, loss: float) -> None:
    """Add a point to the curve, and print it."""
    point = {"step": trainer.step, "minutes": round(trainer.elapsed / 60, 2), "tokens": trainer.tokens}
    if trainer.agreement is not None:
        point["agreement"] = round(trainer.agreement, 3)
    trainer.curve.append(point | {"loss": round(loss, 4)})
    (trainer.args.scratch / "curve.json").write_text(json.dumps(trainer.curve))
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} at step {trainer.step}; lower --lr")
    print(json.dumps(trainer.curve[-1]), flush=True)


def exam(trainer: Trainer, count: int) -> None:
    scores = trainer.exact_answers(count)
    trainer.curve.append({"step": trainer.step, "exact": scores})
    print(" ".join(f"{name} {score:.2f}" for name, score in scores.items()), flush=True)


def finish(trainer: Trainer) -> None:
    """Export, when asked to."""
    if trainer.args.out:
        export(trainer.model, trainer.tokenizer, trainer.args.out)
        print(f"{trainer.args.out} is written: {trainer.step} steps, {trainer.tokens} tokens", flush=True)


def _emphasis(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    return name, float(factor)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="directory to write the model in, when done")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for checkpoints and the curve")
    parser.add_argument(
        "--teacher", type=Path, default=None, help="directory of a model with the same tokenizer to learn from"
    )
    parser.add_argument("--preset", choices=PRESETS, default="minnow")
    parser.add_argument(
        "--tokenizer", type=Path, default=None, help="a tokenizer.json to use instead of a new one"
    )
    parser.add_argument("--tokenizer-documents", type=int, default=30000)
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train, set-up not counted")
    parser.add_argument(
        "--emphasis",
        nargs="*",
        default=[],
        type=_emphasis,
        metavar="MAKER=FACTOR",
        help="multiply the share of a maker of skills.py",
    )
    parser.add_argument("--rows", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=352, help="tokens a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=20, help="steps between points of the curve")
    parser.add_argument("--exam-minutes", type=float, default=6.0)
    parser.add_argument("--exam-count", type=int, default=16, help="held-out exchanges a skill")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
