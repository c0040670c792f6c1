"""Tokens per second of smlib's sampler beside `model.generate`, on a random tiny Llama, one thread of a CPU.

    python benchmarks/sampling.py

Both draw 8 completions for each of the same prompts (40-59 tokens) at temperature 1, up to 96 new tokens. Twelve of
the 600 tokens count as end-of-sequence, so lengths vary as those of rationales do, with a mean near 45. Tokens up to
and including the end-of-sequence token count; padding after it does not. Time is processor time, so other work on
the machine disturbs little; the rounds alternate, and the best of each is shown.
"""

import random
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smlib.sampling import sample_ids

PROMPTS, N, NEW_TOKENS, ROUNDS = 64, 8, 96, 3
EOS = list(range(2, 14))


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = EOS
    return model


def ours(model, prompts, max_batch):
    settings = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 0, "max_batch": max_batch}
    results = sample_ids(model, prompts, N, **settings)
    return sum(len(s.token_ids) for samples in results for s in samples)


@torch.inference_mode()
def generate(model, prompts, batch):
    rows = [prompt for prompt in sorted(prompts, key=len) for _ in range(N)]
    count = 0
    for start in range(0, len(rows), batch):
        block = rows[start : start + batch]
        width = max(map(len, block))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in block])
        output = model.generate(
            ids, attention_mask=(ids != 0).long(), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS
        )
        ended = torch.isin(output[:, width:], torch.tensor(EOS)).int()
        count += int((ended.cumsum(1) - ended == 0).sum())
    return count


def main():
    torch.set_num_threads(1)
    model, draw = tiny_llama(), random.Random(0)
    prompts = [[1] + [draw.randrange(14, 600) for _ in range(39 + draw.randrange(20))] for _ in range(PROMPTS)]
    contestants = {("smlib", size): ours for size in (128, 256, 512)}
    contestants |= {("generate", size): generate for size in (32, 64, 128, 256, 512)}
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(ROUNDS):
        for (name, size), run in contestants.items():
            start = time.process_time()
            count = run(model, prompts, size)
            best[name, size] = max(best[name, size], count / (time.process_time() - start))
    for (name, size), speed in best.items():
        print(f"{name:9} batch {size:3}  {speed:8,.0f} tokens/s")
    top = {who: max(speed for (name, _), speed in best.items() if name == who) for who in ("smlib", "generate")}
    print(f"ratio of the best: {top['smlib'] / top['generate']:.2f}")


if __name__ == "__main__":
    main()
