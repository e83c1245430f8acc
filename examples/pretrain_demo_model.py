"""Train the model that `mlxlora demo` fine-tunes, from nothing: tokenizer, weights, Hugging Face layout.

    pip install torch transformers            # a CPU is enough; with a GPU it is minutes
    python examples/pretrain_demo_model.py --out first --steps 2000 --rate 4e-3 --seed 0
    python examples/pretrain_demo_model.py --out second --steps 500 --rate 1.5e-3 --seed 100 --start first

The second command goes on with the first one's model, on names made of the tokenizer's own pieces: else a piece that
training mostly shows as a word of its own (`count`) is not copied where it begins a name (`county`).
The text comes from `mlxlora.demo.corpus`, as much of it as is asked for; the seed decides all of it. PyTorch trains
here because the base model stands for what people download: a Hugging Face model that MLX has never seen.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mlxlora.demo.corpus import END_OF_TEXT, END_OF_TURN, TURN, Recipe, documents, notes_with_sql
from mlxlora.demo.questions import held_out_topic

# words and punctuation with the space before them, numbers by two digits: a name is the same tokens wherever it stands
PIECES = r"--| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the first documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(seed, 20_000), trainer)
    # GPT-2's splitting makes the same tokens of all this text, and llama.cpp knows it by name
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, length: int, seed: int, recipe: Recipe
) -> Iterator[torch.Tensor]:
    """Batches [rows, length + 1] without end: documents one after another, cut into rows."""
    stream = documents(seed + 1, recipe=recipe)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    held: list[int] = []
    while True:
        while len(held) < rows * length + 1:
            texts = list(itertools.islice(stream, 256))
            for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
                held += [*encoding.ids, end]
        cut = np.asarray(held[: rows * length + 1])
        held = held[rows * length :]
        yield torch.from_numpy(np.stack([cut[row * length : (row + 1) * length + 1] for row in range(rows)]))


def optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def lines_right(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, device: str, count: int = 100) -> float:
    """The share of queries, below notes on held-out tables, of which the model predicts every token."""
    rng, recipe = random.Random("validation"), Recipe(topics=held_out_topic)
    right = total = 0
    for _ in range(count):
        text = notes_with_sql(rng, recipe)
        encoding = tokenizer.backend_tokenizer.encode(text)
        ids = torch.tensor([encoding.ids], device=device)
        hit = (model(ids[:, :-1]).logits.argmax(-1) == ids[:, 1:])[0].tolist()
        start = 0
        for line in text.split("\n"):
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if start < b and a < start + len(line) and i]
            if line.startswith("SELECT"):
                total += 1
                right += all(hit[i - 1] for i in inside[1:])
            start += len(line) + 1
    return right / total


def pieces(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """What the tokens of the vocabulary spell, where that is small letters, in order."""
    spelled = {token.removeprefix("Ġ") for token in tokenizer.get_vocab()}
    return tuple(sorted(word for word in spelled if word.isascii() and word.isalpha() and word.islower()))


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    options: argparse.Namespace,
    device: str,
) -> None:
    """Linear warm-up, constant rate, linear decay over the last 40 % of the steps."""
    chosen = optimizers(model, options.rate)
    stream = batches(tokenizer, options.rows, options.length, options.seed, recipe)
    start = time.perf_counter()
    for step in range(options.steps):
        factor = min(1.0, (step + 1) / 50, (options.steps - step) / (0.4 * options.steps))
        batch = next(stream).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = options.rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if step % options.report == options.report - 1 or step + 1 == options.steps:
            tokens, seconds = (step + 1) * options.rows * options.length, time.perf_counter() - start
            right = lines_right(model, tokenizer, device)
            print(
                f"step {step + 1:5d}  loss {loss.item():.3f}  held-out queries right {right:.3f}  "
                f"{tokens / 1e6:.2f} M tokens  {tokens / seconds:,.0f}/s",
                flush=True,
            )


def configuration(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> Qwen3Config:
    """Qwen3 with heads of 32."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a model that this script wrote, to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--report", type=int, default=100)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    if options.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
        model = Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        recipe = Recipe(pieces=pieces(tokenizer), joins=0.25)
    else:
        tokenizer = train_tokenizer(options.vocabulary, options.seed)
        model = Qwen3ForCausalLM(configuration(tokenizer, options))
        recipe = Recipe()
    model.to(device)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, on {device}", flush=True)
    train(model, tokenizer, recipe, options, device)
    model.to(torch.bfloat16).save_pretrained(options.out)
    for where in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business there
        tokenizer.init_kwargs.pop(where, None)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
