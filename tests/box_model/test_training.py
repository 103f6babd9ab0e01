"""The training side: our network is Hugging Face's Qwen3, packing loses nothing, and a step learns."""

from __future__ import annotations

import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.box_model.batches import IGNORED, pack
from examples.box_model.data import documents
from examples.box_model.export import export, read
from examples.box_model.model import Qwen3, Sizes, document_mask
from examples.box_model.tokenizer import train_tokenizer
from examples.box_model.train import PRESETS, Trainer, distance, learning_rate, parse_args

SIZES = Sizes(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
LENGTH = 352


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(1024, 1500, seed=0)


def test_our_network_computes_what_transformers_computes(tokenizer, tmp_path):
    model = Qwen3(SIZES, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.mul(3).to(torch.bfloat16))
    export(model, tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40)[None] * 7 % 1024
    ours = model.logits(model.hidden(ids, torch.arange(40)[None], None))
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_packed_document_sees_only_itself(tokenizer):
    model = Qwen3(SIZES, seed=2)
    batch = next(pack(tokenizer, documents(0), rows=2, length=LENGTH))
    packed = model.hidden(batch.ids, batch.positions, document_mask(batch.documents, torch.float32))
    chosen = batch.documents[1] == 2
    ids, positions = batch.ids[1, chosen][None], batch.positions[1, chosen][None]
    assert positions[0].tolist() == list(range(ids.shape[1]))
    torch.testing.assert_close(packed[1, chosen], model.hidden(ids, positions, None)[0], rtol=1e-4, atol=1e-5)


def test_packing_keeps_every_token_and_trains_only_on_answers(tokenizer):
    some = list(islice(documents(0), 200))
    wanted = sorted(
        token for document in some for text, _ in document for token in tokenizer.encode(text).ids
    )
    said = sum(len(tokenizer.encode(text).ids) for document in some for text, is_said in document if is_said)
    plain = sum(document[0][1] for document in some)  # the first token of a plain text is never predicted
    batches = list(pack(tokenizer, iter(some), rows=4, length=1200))
    assert sorted(token for b in batches for token in b.ids[b.documents > 0].tolist()) == wanted
    assert sum(int((b.targets != IGNORED).sum()) for b in batches) == said - plain


def test_a_few_steps_lower_the_loss(tokenizer):
    model = Qwen3(SIZES, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = next(pack(tokenizer, documents(0), rows=4, length=LENGTH))
    mask, losses = document_mask(batch.documents, torch.float32), []
    for _ in range(8):
        logits = model.logits(model.hidden(batch.ids, batch.positions, mask))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    assert learning_rate(0.0) < learning_rate(0.01) < learning_rate(0.02) == learning_rate(0.5) == 1.0
    assert learning_rate(0.9) < learning_rate(0.7) < 1.0
    assert learning_rate(1.0) == 0.0


def test_a_document_longer_than_a_row_is_left_out(tokenizer):
    long, short = [("word " * 100, True)], [("word", True)]
    [batch] = pack(tokenizer, iter([long, short]), rows=1, length=50)
    assert int(batch.documents.max()) == 1
    assert int((batch.documents > 0).sum()) == len(tokenizer.encode("word").ids)


def test_an_exported_model_is_read_back_as_it_was_written(tokenizer, tmp_path):
    model = Qwen3(SIZES, seed=4)
    export(model, tokenizer, tmp_path)
    again = read(tmp_path)
    assert again.sizes == SIZES
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16).float()), name


def test_a_draft_comes_nearer_to_what_its_teacher_says(tokenizer, tmp_path, monkeypatch):
    teacher = Qwen3(SIZES, seed=5)
    with torch.no_grad():  # an opinion: without one there is nothing to learn
        teacher.model.embed_tokens.weight.mul_(8)
    export(teacher, tokenizer, tmp_path)
    monkeypatch.setitem(PRESETS, "minnow-draft", SIZES)
    command = ["train", "--scratch", str(tmp_path), "--teacher", str(tmp_path), "--preset", "minnow-draft"]
    monkeypatch.setattr(sys, "argv", [*command, "--no-compile", "--seed", "6"])
    trainer = Trainer(parse_args(), tokenizer)
    trainer.elapsed = 60.0  # past the warm-up
    batch = next(pack(tokenizer, documents(0), rows=2, length=LENGTH))
    losses = [trainer.train_on(batch) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= trainer.agreement <= 1
    said, taught = trainer.answers(batch)[0].float(), trainer.taught(batch)
    assert said.shape == taught.shape
    torch.testing.assert_close(distance(taught, taught), torch.tensor(0.0))
